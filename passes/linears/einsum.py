"""A product of an activation and a weight as an Einstein sum, and its canonical form."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..graph.nodes import Emitter, aten, call, ops, parameter_behind
from ..graph.site import Layout, WeightView
from ..graph.weights import dims, matrix_view, whole_view


@dataclass
class Product:
    """One product with a weight, before it is canonical.

    Attributes:
        x: the activation.
        weight: the node that reads the parameter through views.
        sum: letters of ``x``, of ``weight`` and of the result; a contraction has no other letters.
        bias: ``[out]``, or anything that broadcasts against the result.
        scale: factors of the product and of the bias (``addmm``'s alpha and beta).
    """

    x: fx.Node
    weight: fx.Node
    sum: tuple[str, str, str]
    bias: Any = None
    scale: tuple[float, float] = (1, 1)


def spelling(node: fx.Node) -> str:
    """``addmm``, ``einsum``, ``grouped_mm``: the operation as its user wrote it."""
    name = getattr(
        getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target)
    )
    return str(name).strip("_").removesuffix("_fallback")


@dataclass
class Roles:
    """Letters by role: of a stack (in all three), summed over, of the result from ``x``, from the weight."""

    stack: str
    summed: str
    rows: str
    out: str


def roles_of(product: Product) -> Roles | None:
    """The letters' roles; None where one is summed in one factor alone, or nothing is summed over."""
    xs, ws, out = product.sum
    sizes = product.weight.meta["val"].shape
    ws_real = [c for c in ws if c in xs + out or sizes[ws.index(c)] != 1]
    if any(c not in ws + out for c in xs) or any(c not in xs + out for c in ws_real):
        return None
    roles = Roles(
        "".join(c for c in out if c in xs and c in ws),
        "".join(c for c in xs if c in ws and c not in out),
        "".join(c for c in out if c in xs and c not in ws),
        "".join(c for c in out if c in ws and c not in xs),
    )
    return roles if roles.summed else None


def part_of(product: Product, roles: Roles) -> WeightView | None:
    """What a product reads that takes only some rows of a parameter, or one expert of a stack."""
    if dims(product.weight) != 2 or roles.stack or len(roles.out) != 1:
        return None
    return matrix_view(product.weight, transposed=product.sum[1] != roles.out + roles.summed)


def contract(graph: fx.Graph, node: fx.Node, product: Product, name: str) -> fx.Node:
    """The product as ``linear`` (or ``grouped_linear`` for a stack); returns the node of its result.

    The caller sets the insertion point.
    """
    roles = roles_of(product)
    assert roles is not None
    xs, ws, out = product.sum
    build = Builder(graph, node, name)
    size = build.sizes(product)

    groups = [roles.stack, roles.out, roles.summed]
    letters = "".join(groups)
    sizes = dict(zip(ws, map(int, product.weight.meta["val"].shape), strict=True))
    matrix = [math.prod(sizes[c] for c in g) for g in groups]
    whole = whole_view(product.weight)
    if whole is None:
        weight = build.part(product, roles)
    else:
        unit = [c for c in ws if c not in letters]  # size 1: the window of a 1x1 convolution
        order = tuple(whole.permute[ws.index(c)] for c in (*letters, *unit))
        layout = Layout(whole.view, order, tuple(matrix if roles.stack else matrix[1:]))
        weight = build.weight(product.weight, layout)

    x = build.arrange(product.x, xs, roles.stack + roles.rows + roles.summed)
    rows = [size(c) for c in roles.stack + roles.rows]
    one = len(roles.out) == 1
    if roles.stack:
        count = [size(c) for c in roles.rows]
        x = build.then(aten.reshape.default, x, [-1, matrix[2]], suffix="rows")
        ends = build.ends(matrix[0], count)
        y = build.main(ops.grouped_linear.default, x, weight, ends)
    else:
        if len(roles.summed) != 1:
            x = build.then(aten.reshape.default, x, [*rows, matrix[2]], suffix="rows")
        inner_bias = product.bias if one and fits(product, roles) else None
        args = (x, weight) if inner_bias is None else (x, weight, inner_bias)
        y = build.main(aten.linear.default, *args)
    if roles.stack or not one:
        y = build.then(
            aten.reshape.default, y, [*rows, *(sizes[c] for c in roles.out)], suffix="unfold"
        )
    y = build.arrange(y, roles.stack + roles.rows + roles.out, out)
    alpha, beta = product.scale
    if roles.stack or not (one and fits(product, roles)):
        if alpha != 1:
            y = build.then(aten.mul.Tensor, y, alpha, suffix="alpha")
        if product.bias is not None and beta != 0:
            bias = product.bias
            if beta != 1:
                bias = build.then(aten.mul.Tensor, bias, beta, suffix="beta")
            y = build.then(aten.add.Tensor, y, bias, suffix="bias")
    return y


def fits(product: Product, roles: Roles) -> bool:
    """True if the bias is one number per output feature, as ``linear`` takes it, and nothing is scaled."""
    if product.scale != (1, 1):
        return False
    return product.bias is None or (dims(product.bias) == 1 and len(roles.out) == 1)


class Builder:
    """Makes the nodes that stand for ``node``."""

    def __init__(self, graph: fx.Graph, node: fx.Node, name: str) -> None:
        self.graph, self.node, self.name = graph, node, name
        self.then = Emitter(graph, node, name)

    def main(self, target: Any, *args: Any) -> fx.Node:
        """The canonical product itself."""
        made = call(self.graph, target, args, name=self.name, like=self.node)
        made.meta["op"] = spelling(self.node)
        return made

    def sizes(self, product: Product) -> Callable[[str], Any]:
        """The size of a letter: a number, or a node where it is symbolic."""
        xs = product.sum[0]

        @functools.cache
        def size(letter: str) -> Any:
            if letter not in xs:
                value = product.weight.meta["val"].shape[product.sum[1].index(letter)]
                return int(value)
            value = product.x.meta["val"].shape[xs.index(letter)]
            if not isinstance(value, torch.SymInt):
                return int(value)
            return self.then(
                aten.sym_size.int, product.x, xs.index(letter), suffix=f"size_{letter}"
            )

        return size

    def arrange(self, value: fx.Node, have: str, want: str) -> fx.Node:
        """Permute dimensions from the order ``have`` to ``want``."""
        if have == want:
            return value
        order = [have.index(c) for c in want]
        if len(order) >= 2 and order[:-2] == list(range(len(order) - 2)):
            return self.then(aten.transpose.int, value, -2, -1, suffix="arranged")
        return self.then(aten.permute.default, value, order, suffix="arranged")

    def weight(self, node: fx.Node, layout: Layout) -> fx.Node:
        """A node that computes the canonical weight, tagged with what it reads."""
        root = parameter_behind(node)
        assert root is not None
        raw = tuple(root.meta["val"].shape)
        if layout.plain and raw == layout.shape:
            return root
        at = root
        if raw == layout.view == layout.shape[::-1] and layout.permute == (1, 0):
            at = call(self.graph, aten.t.default, (root,), name=f"{root.name}_t", like=self.node)
        else:
            steps: list[tuple[Any, list[int]]] = []
            if raw != layout.view:
                steps.append((aten.reshape.default, list(layout.view)))
            if not layout.plain:
                steps.append((aten.permute.default, list(layout.permute)))
            if tuple(layout.view[i] for i in layout.permute) != layout.shape:
                steps.append((aten.reshape.default, list(layout.shape)))
            for target, arg in steps:
                at = call(self.graph, target, (at, arg), name=f"{root.name}_matrix", like=self.node)
        at.meta["weight_view"] = WeightView(root.meta["stored"], layout)
        return at

    def part(self, product: Product, roles: Roles) -> fx.Node:
        """The weight argument itself, transposed if need be, tagged with the part that it reads."""
        view = part_of(product, roles)
        assert view is not None
        weight = product.weight
        if product.sum[1] != roles.out + roles.summed:
            weight = self.then(aten.t.default, weight, suffix="weight_t")
        weight.meta["weight_view"] = view
        return weight

    def ends(self, groups: int, sizes: list[Any]) -> fx.Node:
        """``[n, 2n, ..., groups * n]`` where each group has ``n = prod(sizes)`` rows."""
        rows: Any = 1
        for size in sizes:
            if isinstance(rows, int) and isinstance(size, int):
                rows = rows * size
            elif rows == 1:
                rows = size
            else:
                rows = self.then(operator.mul, rows, size, suffix="count")
        device = self.node.meta["val"].device
        integers = {"dtype": torch.int64, "device": device}
        ends = self.then(aten.arange.start, 1, groups + 1, suffix="groups", **integers)
        return self.then(aten.mul.Tensor, ends, rows, suffix="ends")
