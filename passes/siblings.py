"""siblings: linears that read the same input share the first product of their adapters."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from .graph.blocks import NONE, Block, blocks
from .graph.nodes import Emitter, aten, cast, uncast


def siblings(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Stack ``lora_A`` of linears with one input (q, k and v; gate and up): one product where there were several.

    The backward gains more: one product for the gradient of all ``lora_A``, and one for that of the input,
    which is then added up once. The parameters stay separate tensors; the stack is small. Base weights are
    not stacked: their products are large enough, and one wide product was no faster here. Dropout gives each
    linear an input of its own, so with it there are no siblings. Linears of other blocks are none either (every decoder
    layer reads the encoder's states): blocks that are equal must stay so, to be compiled once. Factors that are cut out of a stack, or
    exchanged, carry no ``meta["lora_a"]``: they are computed where they are used and stay there.

    Before::

        %q_lora_a: f32[B, S, 2] = aten.linear(%x, %q_lora_A_weight)
        %k_lora_a: f32[B, S, 2] = aten.linear(%x, %k_lora_A_weight)

    After::

        %q_lora_stack: f32[4, 8] = aten.cat([%q_lora_A_weight, %k_lora_A_weight])
        %q_lora_a_all: f32[B, S, 4] = aten.linear(%x, %q_lora_stack)
        %q_lora_a_part: f32[B, S, 2] = aten.slice(%q_lora_a_all, -1, 0, 2)
        %k_lora_a_part: f32[B, S, 2] = aten.slice(%q_lora_a_all, -1, 2, 4)
    """
    graph = gm.graph
    block_of = blocks(graph)
    families: dict[tuple[fx.Node, torch.dtype, Block], list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.linear.default):
        if "lora_a" not in node.meta:
            continue
        key = (uncast(node.args[0]), node.meta["val"].dtype, block_of.get(node, NONE))
        families.setdefault(key, []).append(node)
    found = [family for family in families.values() if len(family) > 1]
    for family in found:
        stack(graph, family)
    if found:
        graph.eliminate_dead_code()
    return PassResult(gm, bool(found))


def stack(graph: fx.Graph, family: list[fx.Node]) -> None:
    first = family[0]
    name = first.name.removesuffix("_a")
    then = Emitter(graph, first, name)
    with graph.inserting_before(first):
        factors = [uncast(node.args[1]) for node in family]
        whole = then(aten.cat.default, factors, suffix="stack")
        whole = cast(graph, whole, first.meta["val"].dtype, f"{name}_stack_low", like=first)
        together = then(aten.linear.default, first.args[0], whole, suffix="a_all")
        together.meta["stack_of"] = tuple(node.name for node in family)
        start = 0
        for node in family:
            stop = start + int(node.meta["val"].shape[-1])
            emit = Emitter(graph, node, node.name)
            part = emit(aten.slice.Tensor, together, -1, start, stop, suffix="part")
            node.replace_all_uses_with(part)
            start = stop
    for node in family:
        graph.erase_node(node)
