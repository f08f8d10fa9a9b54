"""masked_rows: features in the places of their placeholders, without counting the places on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .graph.nodes import Emitter, arguments, aten, ops


def masked_rows(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Scatter whole rows by ``qlora_fx.masked_rows``, whose backward waits for no device.

    A mask per row is what models make of placeholders' ids. Another kind of ``masked_scatter`` is kept.

    Before::

        %mask: bool[B, S, 1] = aten.unsqueeze(%is_picture, -1)
        %joined: f32[B, S, 8] = aten.masked_scatter(%embeds, %mask, %features)

    After::

        %joined_mask: bool[B, S] = aten.select(%mask, -1, 0)
        %joined_rows: f32[B, S, 8] = qlora_fx.masked_rows(%embeds, %joined_mask, %features)
    """
    graph = gm.graph
    modified = False
    for node in graph.find_nodes(op="call_function", target=aten.masked_scatter.default):
        modified |= rewrite(graph, node)
    if modified:
        graph.eliminate_dead_code()
    return PassResult(gm, modified)


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
        new = emit(ops.masked_rows.default, x, marked, source, suffix="rows")
    node.replace_all_uses_with(new)
    return True
