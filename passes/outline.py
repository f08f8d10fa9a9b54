"""outline: repeated blocks become one body, called once per layer with that layer's tensors."""

from __future__ import annotations

import operator
from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from .graph.blocks import NONE, Block, blocks, class_of
from .graph.body import Body
from .graph.nodes import placeholders


@dataclass
class Segment:
    """A run of nodes that becomes one body: a block of the model, or what lies between blocks."""

    block: Block
    nodes: list[fx.Node] = field(default_factory=list)


def outline(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Split the graph at the model's repeated blocks and call each distinct body where it stood.

    Blocks are elements of lists of modules (Note [What a block is] in graph/blocks.py). Two share a body
    when they are equal node by node, up to the names of the tensors they read. What lies before, between
    and after blocks becomes bodies of its own, so that the outer graph only calls.

    Before::

        %layers_0_up: f32[B, S, 8] = aten.linear(%x, %layers_0_up_weight)
        %layers_1_up: f32[B, S, 8] = aten.linear(%layers_0_up, %layers_1_up_weight)

    After::

        %layers_0: f32[B, S, 8] = Layer(%x, <1 stored>)
        %layers_1: f32[B, S, 8] = Layer(%layers_0, <1 stored>)
    """
    graph = gm.graph
    if any(True for _ in graph.find_nodes(op="call_module")):
        return PassResult(gm, False)
    segments = split(graph)
    if len([s for s in segments if s.block.path]) < 2:
        return PassResult(gm, False)  # nothing repeats: one flat graph is the simplest program
    return PassResult(build(gm, segments), True)


def split(graph: fx.Graph) -> list[Segment]:
    """Segments in execution order; empty if blocks depend on each other in a circle.

    A node outside of all blocks goes as early as its inputs allow, so that masks and rotary tables,
    which depend on no block, are computed once before the first. A value computed from stored tensors
    alone goes where it is first read instead: a dequantized weight must not be held meanwhile.
    """
    block_of = blocks(graph)
    order: dict[Block, int] = {}
    for block in block_of.values():
        order.setdefault(block, len(order))
    level: dict[fx.Node, int] = {}  # outer segments have even levels, blocks odd ones
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inputs = [level[n] for n in node.all_input_nodes if n in level]
        if node.target is operator.getitem and inputs:
            level[node] = inputs[0]  # bodies pass tensors to each other, not lists of them
            continue
        if node in block_of:
            level[node] = 2 * order[block_of[node]] + 1
            if any(i > level[node] for i in inputs):
                return []
        else:
            level[node] = max(((i + 1) // 2 * 2 for i in inputs), default=0)
    for node in reversed(graph.nodes):
        if node not in level or node in block_of or not node.users:
            continue
        is_list = isinstance(node.meta["val"], (tuple, list)) or node.target is operator.getitem
        if from_storage(node) and not is_list:
            level[node] = min(level.get(user, level[node]) for user in node.users)
    names = {2 * i + 1: block for block, i in order.items()}
    segments: dict[int, Segment] = {}
    for node, i in level.items():  # in graph order
        segments.setdefault(i, Segment(names.get(i, NONE))).nodes.append(node)
    return [segments[i] for i in sorted(segments)]


def from_storage(node: fx.Node) -> bool:
    """True if the value depends on stored tensors alone."""
    inputs = node.all_input_nodes
    return bool(inputs) and all(
        "stored" in n.meta if n.op == "placeholder" else from_storage(n) for n in inputs
    )


def build(gm: fx.GraphModule, segments: list[Segment]) -> fx.GraphModule:
    root = nn.Module()
    outer = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in placeholders(gm.graph):
        env[node] = outer.create_node("placeholder", node.target, name=node.name)
        env[node].meta = dict(node.meta)
    output = next(n for n in gm.graph.nodes if n.op == "output")
    names: dict[Hashable, str] = {}
    bodies = [Body(segment.nodes, segment.block.path) for segment in segments]
    read = {n for body in bodies for n in body.inputs if body.env[n].users}
    read |= set(output.all_input_nodes)
    for position, (segment, body) in enumerate(zip(segments, bodies, strict=True)):
        body.finish([n for n in segment.nodes if n in read])
        if not body.outputs:
            continue
        key = body.key()
        if key not in names:
            names[key] = body_name(segment, position, len(segments), set(names.values()))
            root.add_module(names[key], fx.GraphModule(nn.Module(), body.graph, names[key]))
        emit_call(outer, names[key], body, segment, env)
    outer.output(fx.map_arg(output.args[0], lambda n: env[n]))
    result = fx.GraphModule(root, outer, type(gm).__name__)
    result.meta = dict(gm.meta)
    return result


def body_name(segment: Segment, position: int, total: int, taken: set[str]) -> str:
    """The block's class (``LlamaDecoderLayer``); ``prologue``, ``epilogue`` or ``between`` outside."""
    if segment.block.path:
        found = (class_of(node, segment.block.path) for node in segment.nodes)
        base = next(filter(None, found), "block").rpartition(".")[2]
    else:
        base = "prologue" if position == 0 else "epilogue" if position == total - 1 else "between"
    name, n = base, 2
    while name in taken:
        name, n = f"{base}_{n}", n + 1
    return name


def emit_call(
    outer: fx.Graph, name: str, body: Body, segment: Segment, env: dict[fx.Node, fx.Node]
) -> None:
    call_name = segment.block.path.replace(".", "_") or name
    args = tuple(env[n] for n in body.inputs)
    call = outer.create_node("call_module", name, args, name=call_name)
    call.meta["module"] = segment.block.path
    vals = [n.meta["val"] for n in body.outputs]
    call.meta["val"] = vals[0] if len(vals) == 1 else tuple(vals)
    if len(vals) == 1:
        env[body.outputs[0]] = call
        return
    for i, node in enumerate(body.outputs):
        item = outer.create_node("call_function", operator.getitem, (call, i), name=node.name)
        item.meta.update(val=node.meta["val"], module=segment.block.path)
        env[node] = item
