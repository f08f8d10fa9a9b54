"""normalize: bring every spelling of a linear to ``aten.linear``, everything to one device, and drop what computes nothing."""

from __future__ import annotations

import re

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from ..config import Config
from .graph.nodes import CASTS, aten, placeholders
from .graph.values import fake_value
from .graph.weights import matrix_view
from .linears.einsum import contract, spelling
from .linears.experts import batched, grouped
from .linears.spellings import recognise
from .masked_rows import note_counts

ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range_for_size.default,
        aten.sym_constrain_range.default,
    }
)
FULL_SLICE_END = 2**63 - 1


def normalize(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Rewrite each product with a weight to ``linear`` or ``grouped_linear``; remove assertions and no-ops.

    Known spellings are in spellings.py and experts.py. A weight argument that is a view of a parameter gets
    ``meta["weight_view"]``. Shape assertions may go because the program checks the captured guards before
    it runs the graph. Last, numbers that a model makes on the CPU are made where it is.

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
            note_counts(node)
            graph.erase_node(node)
            modified = True
        elif is_noop(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            modified = True
        else:
            modified |= rewrite(graph, node)
    modified |= on_one_device(graph)
    modified |= graph.eliminate_dead_code()
    return PassResult(gm, modified)


MADE = frozenset({aten.full.default, aten.scalar_tensor.default})
"""What makes a tensor of a number."""


def on_one_device(graph: fx.Graph) -> bool:
    """Make numbers on the model's device that its code makes on the CPU; True if there were any.

    PyTorch lets a tensor without dimensions be anywhere. Inductor folds constants with one dimension, and would find two
    devices. And a kernel on a GPU reads its own memory faster.
    """
    device = next(n.meta["val"].device for n in placeholders(graph) if "input" in n.meta)
    moved: set[fx.Node] = set()
    if device.type == "cpu":
        return False
    for node in graph.nodes:
        val = node.meta.get("val")
        if node.target in MADE and val.device.type == "cpu" and not val.dim():
            node.kwargs = node.kwargs | {"device": device}
        elif node.op != "call_function" or moved.isdisjoint(node.all_input_nodes):
            continue
        new = fake_value(graph, node.target, node.args, node.kwargs)
        if devices(new) != devices(val):
            node.meta["val"] = new
            moved.add(node)
    return bool(moved)


def devices(val: object) -> list[torch.device]:
    return [t.device for t in pytree.tree_leaves(val) if isinstance(t, torch.Tensor)]


def rewrite(graph: fx.Graph, node: fx.Node) -> bool:
    """Make a product with a weight canonical; True if anything changed."""
    if node.target is aten.linear.default and tag_weight(node):
        return True
    name = re.sub(rf"_{spelling(node)}(_\d+)?$", r"\1", node.name) or node.name
    product = recognise(node)
    with graph.inserting_before(node):
        if product is not None:
            new: fx.Node | None = contract(graph, node, product, name)
        else:
            new = grouped(graph, node, name) or batched(graph, node, name)
    if new is None:
        return False
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return True


def tag_weight(linear: fx.Node) -> bool:
    """Note what the weight argument of a linear reads, where it is a view of a parameter."""
    weight = linear.args[1]
    if (
        not isinstance(weight, fx.Node)
        or weight.op == "placeholder"
        or "weight_view" in weight.meta
    ):
        return False
    view = matrix_view(weight)
    if view is None:
        return False
    weight.meta["weight_view"] = view
    return True


def is_noop(node: fx.Node) -> bool:
    """A cast to the dtype and device it already has, a whole slice, a dropout that drops nothing."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    if node.target in CASTS or node.target is aten.to.other:
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
