"""normalize: bring every spelling of a linear to ``aten.linear`` and drop what computes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .nodes import aten, call, parameter_behind

ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range_for_size.default,
        aten.sym_constrain_range.default,
    }
)
CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other})
FULL_SLICE_END = 2**63 - 1


def normalize(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Rewrite ``addmm`` on a parameter to ``linear`` and remove assertions and no-ops.

    Shape assertions may go because the program checks the captured guards before it runs the graph.

    Before::

        _ = aten._assert_tensor_metadata(%h, dtype=f32)
        %h_f32: f32[B, S, 8] = aten.to.dtype(%h, f32)
        %c_attn_addmm: f32[B*S, 24] = aten.addmm(%c_attn_bias, %x, %c_attn_weight)

    After::

        %c_attn_weight_t: f32[24, 8] = aten.t(%c_attn_weight)
        %c_attn: f32[B*S, 24] = aten.linear(%x, %c_attn_weight_t, %c_attn_bias)
    """
    graph = gm.graph
    modified = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif is_noop(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.addmm.default and is_weight_matmul(node):
            rewrite_addmm(graph, node)
        else:
            continue
        modified = True
    modified |= graph.eliminate_dead_code()
    return PassResult(gm, modified)


def is_noop(node: fx.Node) -> bool:
    """A cast to the dtype and device it already has, a whole slice, a dropout that drops nothing."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    if node.target in CASTS:
        copy = bool(node.kwargs.get("copy")) or (len(node.args) > 3 and node.args[3] is True)
        keeps_format = node.kwargs.get("memory_format") in (None, torch.preserve_format)
        return (
            not copy
            and keeps_format
            and before.dtype == after.dtype
            and before.device == after.device
        )
    if node.target is aten.slice.Tensor:
        start = node.args[2] if len(node.args) > 2 else None
        end = node.args[3] if len(node.args) > 3 else None
        step = node.args[4] if len(node.args) > 4 else 1
        return bool(start in (None, 0) and end in (None, FULL_SLICE_END) and step == 1)
    if node.target is aten.dropout.default:
        return bool(node.args[1] == 0.0) or node.args[2] is False
    return False


def is_weight_matmul(node: fx.Node) -> bool:
    """``addmm(bias, x, weight)`` with a stored 2-D weight, a 1-D bias and no scale factors."""
    bias, _, weight = node.args
    return (
        parameter_behind(weight) is weight
        and isinstance(bias, fx.Node)
        and bias.meta["val"].dim() == 1
        and all(node.kwargs.get(k, 1) == 1 for k in ("alpha", "beta"))
    )


def rewrite_addmm(graph: fx.Graph, node: fx.Node) -> None:
    bias, x, weight = node.args
    assert isinstance(weight, fx.Node)
    name = node.name.removesuffix("_addmm")
    with graph.inserting_before(node):
        weight_t = call(graph, aten.t.default, (weight,), name=f"{weight.name}_t", like=node)
        linear = call(graph, aten.linear.default, (x, weight_t, bias), name=name, like=node)
    linear.meta["op"] = "addmm"
    node.replace_all_uses_with(linear)
    graph.erase_node(node)
