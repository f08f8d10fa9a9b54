"""Products with stacks of experts that are no plain Einstein sum: grouped rows, and a matrix gathered per row."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from ...transformers_internals import grouped_mm_fallback
from ..graph.nodes import args_of, aten, call, ops
from ..graph.site import Layout
from ..graph.weights import dims, is_weight, whole_view
from .einsum import Builder


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


GROUPED = frozenset({aten._grouped_mm.default, grouped_mm_fallback})


def batched(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node | None:
    """``bmm(weight[ids], x[:, :, None])``: each row gathers its own expert's matrix. The rows are sorted instead.

    Gathering copies one whole matrix per row; sorted rows meet each matrix once.
    """
    if node.target is not aten.bmm.default:
        return None
    a, b = args_of(node)
    for gathered, other, left in ((a, b, True), (b, a, False)):
        index = indexed(gathered)
        if index is None:
            continue
        weight, ids, transposed = index
        layout = stack_layout(weight, transposed=transposed == left)
        column = other.meta["val"].shape[2 if left else 1]
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
        if {d % 3 for d in args_of(node)[1:]} != {1, 2}:
            return None
        node, transposed = node.args[0], not transposed
    if not isinstance(node, fx.Node) or not node.args:
        return None
    ids: Any = None
    args = args_of(node)
    if node.target is aten.index.Tensor and len(args[1]) == 1:
        ids = args[1][0]
    elif node.target is aten.index_select.default and args[1] == 0:
        ids = args[2]
    if not isinstance(ids, fx.Node) or dims(ids) != 1 or ids.meta["val"].dtype is torch.bool:
        return None
    weight = args[0]
    return (weight, ids, transposed) if is_weight(weight) and dims(weight) == 3 else None
