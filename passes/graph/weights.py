"""What a weight argument reads: a whole parameter in some order of dimensions, some rows of it, one of a stack."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .nodes import CASTS, VIEWS, aten, parameter_behind, weight_like
from .site import Layout, WeightView


def is_weight(node: Any) -> bool:
    """True for a view of a stored parameter of two or more dimensions."""
    return weight_like(parameter_behind(node)) and node.meta["val"].dim() >= 2


def dims(node: Any) -> int:
    return int(node.meta["val"].dim())


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
    height, width = map(int, view.shape)
    size = height * width
    (by_out, by_in), offset = map(int, view.stride()), int(view.storage_offset())
    n = math.prod(raw)
    by_row = by_in == 1 and by_out == width
    by_column = by_out == 1 and by_in >= height
    if len(raw) == 3 and offset % size == 0 and n == raw[0] * size:
        if by_row and raw[1:] == (height, width):
            return WeightView(key, Layout(raw, (0, 1, 2), raw), expert=offset // size)
        if by_column and raw[1:] == (width, height):
            stack = Layout(raw, (0, 2, 1), (raw[0], height, width))
            return WeightView(key, stack, expert=offset // size)
    if by_column and by_in == height and n % size == 0 and offset % size == 0:
        count = n // size  # matrices under each other, read one by one
        stack = Layout((count, width, height), (0, 2, 1), (count, height, width))
        return WeightView(key, stack, expert=offset // size)
    if by_row and n % width == 0 and offset % width == 0:
        whole = (n // width, width)
        return WeightView(
            key, Layout(whole, (0, 1), whole), rows=(offset // width, offset // width + height)
        )
    if by_column and n == by_in * width and offset + height <= by_in:
        fused = Layout((width, by_in), (1, 0), (by_in, width))
        return WeightView(key, fused, rows=(offset, offset + height))
    return None
