"""The ways to write a product with a weight, and what each means as one contraction.

Every spelling is read as an Einstein sum of an activation and a weight: letters of the activation, of the
weight, of the result. ``contract`` builds the canonical form of any such sum.
"""

from __future__ import annotations

import functools
import math
import operator
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .nodes import CASTS, VIEWS, Layout, WeightView, aten, call, ops, parameter_behind, weight_like


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


def recognise(node: fx.Node) -> Product | None:
    """What the node multiplies, if it is a known spelling of a product with a weight but not canonical."""
    reader = SPELLINGS.get(node.target)
    if node.op != "call_function" or reader is None:
        return None
    product = reader(node)
    if product is None:
        return None
    split = splits(product)
    if split is None:
        return None
    if whole_view(product.weight) is None and part_of(product, split) is None:
        return None
    return product


def spelling(node: fx.Node) -> str:
    """``addmm``, ``einsum``, ``grouped_mm``: the operation as its user wrote it."""
    name = getattr(
        getattr(node.target, "overloadpacket", node.target), "__name__", str(node.target)
    )
    return str(name).strip("_").removesuffix("_fallback")


def is_weight(node: Any) -> bool:
    """True for a view of a stored parameter of two or more dimensions."""
    return weight_like(parameter_behind(node)) and node.meta["val"].dim() >= 2


def one_weight(a: Any, b: Any) -> tuple[bool, bool] | None:
    """Which of two factors is a weight; None unless exactly one is."""
    found = (is_weight(a), is_weight(b))
    return found if found[0] != found[1] else None


def dims(node: Any) -> int:
    return int(node.meta["val"].dim())


# -- spellings ------------------------------------------------------------------------------------------


def addmm(node: fx.Node) -> Product | None:
    bias, a, b = node.args
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    return pair(a, b, "nk", "ko", "no", bias, (alpha, beta))


def baddbmm(node: fx.Node) -> Product | None:
    bias, a, b = node.args
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    return pair(a, b, "enk", "eko", "eno", bias, (alpha, beta))


def pair(
    a: Any, b: Any, left: str, right: str, out: str, bias: Any = None, scale: Any = (1, 1)
) -> Product | None:
    which = one_weight(a, b)
    if which is None:
        return None
    if which[1]:
        return Product(a, b, (left, right, out), bias, scale)
    return Product(b, a, (right, left, out), bias, scale)


def mm(node: fx.Node) -> Product | None:
    a, b = node.args
    return pair(a, b, "nk", "ko", "no")


def bmm(node: fx.Node) -> Product | None:
    a, b = node.args
    return pair(a, b, "enk", "eko", "eno")


def mv(node: fx.Node) -> Product | None:
    weight, x = node.args
    return Product(x, weight, ("k", "ok", "o")) if is_weight(weight) else None  # type: ignore[arg-type]


def matmul(node: fx.Node) -> Product | None:
    """``torch.matmul``: broadcasts leading dimensions; of a stack of weights each must be met or not at all."""
    a, b = node.args
    which = one_weight(a, b)
    if which is None:
        return None
    free = string.ascii_lowercase[:10]
    left, right = "nk", "ko"
    if dims(a) == 1:
        left = "k"
    if dims(b) == 1:
        right = "k"
    lead_a, lead_b = max(dims(a) - 2, 0), max(dims(b) - 2, 0)
    lead = free[: max(lead_a, lead_b)]
    letters_a, letters_b = lead[len(lead) - lead_a :], lead[len(lead) - lead_b :]
    for letter in set(letters_a) & set(letters_b):
        sizes = (
            a.meta["val"].shape[letters_a.index(letter)],  # type: ignore[union-attr]
            b.meta["val"].shape[letters_b.index(letter)],  # type: ignore[union-attr]
        )
        if isinstance(sizes[0], torch.SymInt) or sizes[0] != sizes[1]:
            return None
    out = lead + left.replace("k", "") + right.replace("k", "")
    return pair(a, b, letters_a + left, letters_b + right, out)


def linear_of_weight(node: fx.Node) -> Product | None:
    """``linear(weight, x)``: the weight stands where the input belongs."""
    a, b, *bias = node.args
    if one_weight(a, b) != (True, False) or dims(a) != 2 or dims(b) != 2 or any(bias):
        return None
    return Product(b, a, ("nk", "ok", "on"))  # type: ignore[arg-type]


def einsum(node: fx.Node) -> Product | None:
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    which = one_weight(*operands)
    if which is None:
        return None
    sides, _, out = equation.partition("->")
    parts = sides.split(",")
    free = [c for c in string.ascii_letters if c not in equation]
    dots = ""
    for i, part in enumerate(parts):
        if "..." in part:
            if which[i]:
                return None
            dots = "".join(free[: dims(operands[i]) - len(part) + 3])
            parts[i] = part.replace("...", dots)
    if "->" not in equation:
        once = [c for c in sorted(set(sides)) if c.isalpha() and sides.count(c) == 1]
        out = dots + "".join(once)
    out = out.replace("...", dots)
    if any(len(set(p)) < len(p) for p in (*parts, out)):
        return None
    return pair(operands[0], operands[1], parts[0], parts[1], out)


def convolution(node: fx.Node) -> Product | None:
    """A convolution of width 1, stride 1 and one group is a linear over the channels."""
    named = dict(
        zip(("x", "weight", "bias", "stride", "padding", "dilation"), node.args, strict=False)
    )
    groups = node.args[-1] if len(node.args) >= 7 else 1
    x, weight = named["x"], named["weight"]
    if not is_weight(weight):
        return None
    size = list(weight.meta["val"].shape)  # type: ignore[union-attr]
    if len(size) < 3 or dims(x) != len(size) or any(k != 1 for k in size[2:]) or groups != 1:
        return None
    if node.target is aten.convolution.default and node.args[6]:
        return None  # transposed
    plain = all(all(v == 1 for v in many(named.get(k, 1))) for k in ("stride",))
    if not plain or any(v not in (0, "valid", "same") for v in many(named.get("padding", 0))):
        return None
    space = "hwd"[: len(size) - 2]
    return Product(x, weight, (f"bk{space}", f"ok{space.upper()}", f"bo{space}"), named.get("bias"))  # type: ignore[arg-type]


def many(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


SPELLINGS: dict[Any, Callable[[fx.Node], Product | None]] = {
    aten.addmm.default: addmm,
    aten.baddbmm.default: baddbmm,
    aten.mm.default: mm,
    aten.bmm.default: bmm,
    aten.mv.default: mv,
    aten.matmul.default: matmul,
    aten.linear.default: linear_of_weight,
    aten.einsum.default: einsum,
    aten.conv1d.default: convolution,
    aten.conv2d.default: convolution,
    aten.conv3d.default: convolution,
    aten.conv1d.padding: convolution,
    aten.conv2d.padding: convolution,
}


# -- what a weight argument reads -----------------------------------------------------------------------


def strided(node: fx.Node) -> torch.Tensor | None:
    """The view of a stored parameter that ``node`` is, as a tensor without data; None if it is a copy.

    Casts and contiguous copies do not change which element stands where, so they are passed over.
    """
    chain: list[fx.Node] = []
    at = node
    while at.op != "placeholder":
        if at.op != "call_function" or at.target not in VIEWS | CASTS:
            return None
        if any(isinstance(n, fx.Node) for n in (*at.args[1:], *at.kwargs.values())):
            return None
        chain.append(at)
        at = at.args[0]  # type: ignore[assignment]
    if "stored" not in at.meta:
        return None
    base = torch.empty(tuple(at.meta["val"].shape), device="meta")
    value: Any = base
    for step in reversed(chain):
        if step.target in CASTS or step.target in KEEP_ORDER:
            continue
        try:
            value = step.target(value, *step.args[1:], **step.kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError):
            return None
        views = value if isinstance(value, (tuple, list)) else [value]
        if any(v is not base and v._base is not base for v in views):
            return None
    return value if isinstance(value, torch.Tensor) else None


KEEP_ORDER = frozenset(
    {aten.contiguous.default, aten.clone.default, aten.detach.default, aten.alias.default}
)


def whole_view(node: fx.Node) -> Layout | None:
    """The view as a layout of the whole parameter, dimension by dimension; None for a part or a copy."""
    view = strided(node)
    if view is None:
        return None
    root = parameter_behind(node)
    assert root is not None
    sizes, strides = tuple(view.shape), view.stride()
    if math.prod(sizes) != root.meta["val"].numel() or view.storage_offset() != 0:
        return None
    order = sorted(range(len(sizes)), key=lambda d: (-strides[d], sizes[d] == 1, d))
    expected = 1
    for d in reversed(order):
        if sizes[d] != 1 and strides[d] != expected:
            return None
        expected *= sizes[d]
    stored = tuple(sizes[d] for d in order)
    return Layout(stored, tuple(order.index(d) for d in range(len(sizes))), sizes)


def matrix_view(node: fx.Node, *, transposed: bool = False) -> WeightView | None:
    """What an ``[out, in]`` argument reads: the whole parameter, some of its rows, or one expert of a stack.

    With ``transposed`` the argument is ``[in, out]``.
    """
    root = parameter_behind(node)
    view = strided(node)
    if root is None or view is None or view.dim() != 2:
        return None
    key = root.meta["stored"]
    raw: tuple[int, ...] = tuple(root.meta["val"].shape)
    layout = whole_view(node)
    if transposed:
        view = view.t()
        if layout is not None:
            layout = Layout(layout.view, layout.permute[::-1], layout.shape[::-1])
    if layout is not None:
        return WeightView(key, layout)
    out, inn = map(int, view.shape)
    (by_out, by_in), offset = map(int, view.stride()), int(view.storage_offset())
    n = math.prod(raw)
    by_row = by_in == 1 and by_out == inn
    by_column = by_out == 1 and by_in >= out
    if len(raw) == 3 and offset % (out * inn) == 0 and n == raw[0] * out * inn:
        if by_row and raw[1:] == (out, inn):
            return WeightView(key, Layout(raw, (0, 1, 2), raw), expert=offset // (out * inn))
        if by_column and raw[1:] == (inn, out):
            stack = Layout(raw, (0, 2, 1), (raw[0], out, inn))
            return WeightView(key, stack, expert=offset // (out * inn))
    if by_column and by_in == out and n % (out * inn) == 0 and offset % (out * inn) == 0:
        count = n // (out * inn)  # matrices under each other, read one by one
        stack = Layout((count, inn, out), (0, 2, 1), (count, out, inn))
        return WeightView(key, stack, expert=offset // (out * inn))
    if by_row and n % inn == 0 and offset % inn == 0:
        whole = (n // inn, inn)
        return WeightView(
            key, Layout(whole, (0, 1), whole), rows=(offset // inn, offset // inn + out)
        )
    if by_column and n == by_in * inn and offset + out <= by_in:
        fused = Layout((inn, by_in), (1, 0), (by_in, inn))
        return WeightView(key, fused, rows=(offset, offset + out))
    return None


# -- the canonical form ---------------------------------------------------------------------------------


@dataclass
class Split:
    """Letters by role: of a stack (in all three), summed over, of the result from ``x``, from the weight."""

    stack: str
    summed: str
    rows: str
    out: str


def splits(product: Product) -> Split | None:
    """The letters' roles; None where one is summed in one factor alone, or nothing is summed over."""
    xs, ws, out = product.sum
    sizes = product.weight.meta["val"].shape
    ws_real = [c for c in ws if c in xs + out or sizes[ws.index(c)] != 1]
    if any(c not in ws + out for c in xs) or any(c not in xs + out for c in ws_real):
        return None
    split = Split(
        "".join(c for c in out if c in xs and c in ws),
        "".join(c for c in xs if c in ws and c not in out),
        "".join(c for c in out if c in xs and c not in ws),
        "".join(c for c in out if c in ws and c not in xs),
    )
    return split if split.summed else None


def part_of(product: Product, split: Split) -> WeightView | None:
    """What a product reads that takes only some rows of a parameter, or one expert of a stack."""
    if dims(product.weight) != 2 or split.stack or len(split.out) != 1:
        return None
    return matrix_view(product.weight, transposed=product.sum[1] != split.out + split.summed)


def contract(graph: fx.Graph, node: fx.Node, product: Product, name: str) -> fx.Node:
    """The product as ``linear`` (or ``grouped_linear`` for a stack); returns the node of its result.

    The caller sets the insertion point.
    """
    split = splits(product)
    assert split is not None
    xs, ws, out = product.sum
    build = Builder(graph, node, name)
    size = build.sizes(product)

    groups = [split.stack, split.out, split.summed]
    letters = "".join(groups)
    sizes = dict(zip(ws, map(int, product.weight.meta["val"].shape), strict=True))
    matrix = [math.prod(sizes[c] for c in g) for g in groups]
    whole = whole_view(product.weight)
    if whole is None:
        weight = build.part(product, split)
    else:
        unit = [c for c in ws if c not in letters]  # size 1: the window of a 1x1 convolution
        order = tuple(whole.permute[ws.index(c)] for c in (*letters, *unit))
        layout = Layout(whole.view, order, tuple(matrix if split.stack else matrix[1:]))
        weight = build.weight(product.weight, layout)

    x = build.arrange(product.x, xs, split.stack + split.rows + split.summed)
    rows = [size(c) for c in split.stack + split.rows]
    one = len(split.out) == 1
    if split.stack:
        count = [size(c) for c in split.rows]
        x = build.then(aten.reshape.default, x, [-1, matrix[2]], suffix="rows")
        ends = build.ends(matrix[0], count)
        y = build.main(ops.grouped_linear.default, x, weight, ends)
    else:
        if len(split.summed) != 1:
            x = build.then(aten.reshape.default, x, [*rows, matrix[2]], suffix="rows")
        inner_bias = product.bias if one and fits(product, split) else None
        args = (x, weight) if inner_bias is None else (x, weight, inner_bias)
        y = build.main(aten.linear.default, *args)
    if split.stack or not one:
        y = build.then(
            aten.reshape.default, y, [*rows, *(sizes[c] for c in split.out)], suffix="unfold"
        )
    y = build.arrange(y, split.stack + split.rows + split.out, out)
    alpha, beta = product.scale
    if split.stack or not (one and fits(product, split)):
        if alpha != 1:
            y = build.then(aten.mul.Tensor, y, alpha, suffix="alpha")
        if product.bias is not None and beta != 0:
            bias = product.bias
            if beta != 1:
                bias = build.then(aten.mul.Tensor, bias, beta, suffix="beta")
            y = build.then(aten.add.Tensor, y, bias, suffix="bias")
    return y


def fits(product: Product, split: Split) -> bool:
    """True if the bias is one number per output feature, as ``linear`` takes it, and nothing is scaled."""
    if product.scale != (1, 1):
        return False
    return product.bias is None or (dims(product.bias) == 1 and len(split.out) == 1)


class Builder:
    """Makes the nodes that stand for ``node``."""

    def __init__(self, graph: fx.Graph, node: fx.Node, name: str) -> None:
        self.graph, self.node, self.name = graph, node, name

    def then(self, target: Any, *args: Any, suffix: str) -> fx.Node:
        return call(self.graph, target, args, name=f"{self.name}_{suffix}", like=self.node)

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

    def part(self, product: Product, split: Split) -> fx.Node:
        """The weight argument itself, transposed if need be, tagged with the part that it reads."""
        view = part_of(product, split)
        assert view is not None
        weight = product.weight
        if product.sum[1] != split.out + split.summed:
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
        ends = call(
            self.graph,
            aten.arange.start,
            (1, groups + 1),
            {"dtype": torch.int64, "device": device},
            name=f"{self.name}_groups",
            like=self.node,
        )
        return self.then(aten.mul.Tensor, ends, rows, suffix="ends")


# -- stacks of experts ----------------------------------------------------------------------------------


def stack_layout(node: Any, *, transposed: bool) -> Layout | None:
    """``[experts, out, in]`` of an expert operand ``[experts, in, out]`` (``transposed``) or the other order."""
    if not isinstance(node, fx.Node) or dims(node) != 3 or not is_weight(node):
        return None
    whole = whole_view(node)
    if whole is None:
        return None
    order = (0, 2, 1) if transposed else (0, 1, 2)
    return Layout(
        whole.view, tuple(whole.permute[i] for i in order), tuple(whole.shape[i] for i in order)
    )


def grouped(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node | None:
    """transformers' and PyTorch's grouped products: rows sorted by expert, weights ``[experts, in, out]``."""
    if node.target not in GROUPED or len(node.args) + len(node.kwargs) < 3:
        return None
    arguments = dict(zip(("input", "weight", "offs", "bias"), node.args, strict=False))
    arguments.update({"weight": node.kwargs.get("mat2", arguments.get("weight"))})
    arguments.update(node.kwargs)
    stack: Any = arguments["weight"]
    layout = stack_layout(stack, transposed=True)
    if layout is None or arguments.get("bias") is not None or arguments.get("offs") is None:
        return None
    build = Builder(graph, node, name)
    weight = build.weight(stack, layout)
    return build.main(ops.grouped_linear.default, arguments["input"], weight, arguments["offs"])


def grouped_targets() -> frozenset[Any]:
    found = {aten._grouped_mm.default}
    try:
        import transformers.integrations.moe  # noqa: F401 (registers the operator)

        found.add(torch.ops.transformers.grouped_mm_fallback.default)
    except (ImportError, AttributeError):
        pass
    return frozenset(found)


GROUPED = grouped_targets()


def batched(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node | None:
    """``bmm(weight[ids], x[:, :, None])``: each row gathers its own expert's matrix. The rows are sorted instead.

    Gathering copies one whole matrix per row; sorted rows meet each matrix once.
    """
    if node.target is not aten.bmm.default:
        return None
    a, b = node.args
    for gathered, other, left in ((a, b, True), (b, a, False)):
        index = indexed(gathered)
        if index is None:
            continue
        weight, ids, transposed = index
        layout = stack_layout(weight, transposed=transposed == left)
        column = other.meta["val"].shape[2 if left else 1]  # type: ignore[union-attr]
        if layout is None or isinstance(column, torch.SymInt) or column != 1:
            continue
        build = Builder(graph, node, name)
        x = build.then(aten.squeeze.dim, other, 2 if left else 1, suffix="rows")
        ordered = build.then(aten.sort.default, ids, suffix="sort")
        values = build.then(operator.getitem, ordered, 0, suffix="experts")
        order = build.then(operator.getitem, ordered, 1, suffix="order")
        x = build.then(aten.index.Tensor, x, [order], suffix="sorted")
        device = node.meta["val"].device
        experts = call(
            graph,
            aten.arange.default,
            (layout.shape[0],),
            {"dtype": ids.meta["val"].dtype, "device": device},
            name=f"{name}_groups",
            like=node,
        )
        ends = call(
            graph,
            aten.searchsorted.Tensor,
            (values, experts),
            {"right": True},
            name=f"{name}_ends",
            like=node,
        )
        y = build.main(ops.grouped_linear.default, x, build.weight(weight, layout), ends)
        back = build.then(aten.argsort.default, order, suffix="back")
        y = build.then(aten.index.Tensor, y, [back], suffix="unsorted")
        return build.then(aten.unsqueeze.default, y, 2 if left else 1, suffix="column")
    return None


def indexed(node: Any) -> tuple[fx.Node, fx.Node, bool] | None:
    """``(weight, ids, transposed)`` of ``weight[ids]`` with one index of one dimension, maybe transposed after."""
    transposed = False
    while isinstance(node, fx.Node) and node.target is aten.transpose.int:
        if {d % 3 for d in node.args[1:]} != {1, 2}:  # type: ignore[operator]
            return None
        node, transposed = node.args[0], not transposed
    if not isinstance(node, fx.Node) or not node.args:
        return None
    ids: Any = None
    if node.target is aten.index.Tensor and len(node.args[1]) == 1:  # type: ignore[arg-type]
        ids = node.args[1][0]  # type: ignore[index]
    elif node.target is aten.index_select.default and node.args[1] == 0:
        ids = node.args[2]
    if not isinstance(ids, fx.Node) or dims(ids) != 1 or ids.meta["val"].dtype is torch.bool:
        return None
    weight = node.args[0]
    return (weight, ids, transposed) if is_weight(weight) and dims(weight) == 3 else None  # type: ignore[return-value]
