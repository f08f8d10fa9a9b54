"""The ways to write a product with a weight, each read as an Einstein sum; einsum.py builds the canonical form."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..graph.nodes import args_of, aten
from ..graph.weights import dims, is_weight, whole_view
from .einsum import Product, part_of, roles_of


def recognise(node: fx.Node) -> Product | None:
    """What the node multiplies, if it is a known spelling of a product with a weight but not canonical."""
    reader = SPELLINGS.get(node.target)
    if node.op != "call_function" or reader is None:
        return None
    product = reader(node)
    if product is None:
        return None
    roles = roles_of(product)
    if roles is None:
        return None
    if whole_view(product.weight) is None and part_of(product, roles) is None:
        return None
    return product


def one_weight(a: Any, b: Any) -> tuple[bool, bool] | None:
    """Which of two factors is a weight; None unless exactly one is."""
    found = (is_weight(a), is_weight(b))
    return found if found[0] != found[1] else None


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
    weight, x = args_of(node)
    return Product(x, weight, ("k", "ok", "o")) if is_weight(weight) else None


def matmul(node: fx.Node) -> Product | None:
    """``torch.matmul``: broadcasts leading dimensions; of a stack of weights each must be met or not at all."""
    a, b = args_of(node)
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
            a.meta["val"].shape[letters_a.index(letter)],
            b.meta["val"].shape[letters_b.index(letter)],
        )
        if isinstance(sizes[0], torch.SymInt) or sizes[0] != sizes[1]:
            return None
    out = lead + left.replace("k", "") + right.replace("k", "")
    return pair(a, b, letters_a + left, letters_b + right, out)


def linear_of_weight(node: fx.Node) -> Product | None:
    """``linear(weight, x)``: the weight stands where the input belongs."""
    a, b, *bias = args_of(node)
    if one_weight(a, b) != (True, False) or dims(a) != 2 or dims(b) != 2 or any(bias):
        return None
    return Product(b, a, ("nk", "ok", "on"))


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
        zip(("x", "weight", "bias", "stride", "padding", "dilation"), args_of(node), strict=False)
    )
    groups = node.args[-1] if len(node.args) >= 7 else 1
    x, weight = named["x"], named["weight"]
    if not is_weight(weight):
        return None
    size = list(weight.meta["val"].shape)
    if len(size) < 3 or dims(x) != len(size) or any(k != 1 for k in size[2:]) or groups != 1:
        return None
    if node.target is aten.convolution.default and node.args[6]:
        return None  # transposed
    plain = all(all(v == 1 for v in many(named.get(k, 1))) for k in ("stride",))
    if not plain or any(v not in (0, "valid", "same") for v in many(named.get("padding", 0))):
        return None
    space = "hwd"[: len(size) - 2]
    return Product(x, weight, (f"bk{space}", f"ok{space.upper()}", f"bo{space}"), named.get("bias"))


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
    aten.convolution.default: convolution,
    aten.conv1d.default: convolution,
    aten.conv2d.default: convolution,
    aten.conv3d.default: convolution,
    aten.conv1d.padding: convolution,
    aten.conv2d.padding: convolution,
}
