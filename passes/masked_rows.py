"""masked_rows: features in the places of their placeholders, without counting the places on the host."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .graph.nodes import CASTS, Emitter, args_of, arguments, aten, ops, uncast


def masked_rows(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Scatter whole rows by ``qlora_fx.masked_rows``, whose backward waits for no device.

    A mask per row is what models make of placeholders' ids. Where the model itself asserts that there are as many as
    features, the operator does (``note_counts``). Another kind of ``masked_scatter`` is kept.

    Before::

        %mask: bool[B, S, 1] = aten.unsqueeze(%is_picture, -1)
        %joined: f32[B, S, 8] = aten.masked_scatter(%embeds, %mask, %features)

    After::

        %joined_mask: bool[B, S] = aten.select(%mask, -1, 0)
        %joined_rows: f32[B, S, 8] = qlora_fx.masked_rows(%embeds, %joined_mask, %features, False)
    """
    graph = gm.graph
    modified = False
    for node in graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
        modified |= rewrite(graph, node)
    if modified:
        graph.eliminate_dead_code()
    return PassResult(gm, modified)


SAME_PLACES = CASTS | {aten.unsqueeze.default, aten.expand.default, aten.expand_as.default}
EQUAL = frozenset({operator.eq, aten.eq.Scalar, aten.eq.Tensor})


def note_counts(assertion: fx.Node) -> None:
    """Mark the masks whose places an assertion of the model counts, before it is removed, with ``meta["counted"]``.

    transformers compares how many placeholders there are with features (``torch_compilable_check``).
    """
    nodes = [(assertion, False)]
    seen = {*nodes}
    while nodes:
        node, equal = nodes.pop()
        mask = counted(node)
        if mask is not None and equal:
            for source in mask.all_input_nodes[:1]:
                for same in source.users:  # models compare ids anew for each use
                    if (same.target, same.args) == (mask.target, mask.args):
                        same.meta["counted"] = True
        elif mask is None and node.target is not aten.sym_size.int:
            equal = equal or node.target in EQUAL
            new = {(n, equal) for n in node.all_input_nodes} - seen
            seen |= new
            nodes += new


def counted(node: fx.Node) -> fx.Node | None:
    """The mask whose places a number is: ``mask.sum()``, or the size of ``x[mask]``."""
    if node.target is aten.sum.default:
        return uncast(node.args[0], SAME_PLACES)
    picked = node.args[0] if node.target is aten.sym_size.int else None
    if isinstance(picked, fx.Node) and picked.target is aten.index.Tensor:
        _, indices = args_of(picked)
        if len(indices) == 1 and indices[0].meta["val"].dtype == torch.bool:
            return uncast(indices[0], SAME_PLACES)
    return None


def rewrite(graph: fx.Graph, node: fx.Node) -> bool:
    args = arguments(node)
    x, mask, source = args["self"], args["mask"], args["source"]
    if mask.target in (aten.expand.default, aten.expand_as.default):
        mask = mask.args[0]
    to, marks, given = (n.meta["val"] for n in (x, mask, source))
    if (
        marks.dim() != to.dim()
        or [str(s) for s in marks.shape] != [*map(str, to.shape[:-1]), "1"]
        or isinstance(to.shape[-1], torch.SymInt)
        or str(given.shape[-1]) != str(to.shape[-1])
    ):
        return False
    emit = Emitter(graph, node)
    with graph.inserting_before(node):
        marked = emit(aten.select.int, mask, -1, 0, suffix="mask")
        if given.dim() != 2:
            source = emit(aten.reshape.default, source, [-1, int(to.shape[-1])], suffix="source")
        exactly = uncast(mask, SAME_PLACES).meta.get("counted", False)
        new = emit(ops.masked_rows.default, x, marked, source, exactly, suffix="rows")
    node.replace_all_uses_with(new)
    return True
