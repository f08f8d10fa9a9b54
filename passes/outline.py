"""outline: repeated blocks become one body, called once per layer with that layer's tensors."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from .graph.nodes import aten, identifier, placeholders

INDEXED = re.compile(r"^(?P<container>.*?)\.(?P<index>\d+)(?=\.|$)")

INPUT_META = frozenset({"val", "stored", "stored_dtype", "format", "trainable"})
"""What an input of a body keeps of the node it stands for; marks such as ``site`` stay with that node."""
OF_FLAT_GRAPH = frozenset({"storage"})
"""Marks that hold nodes of the graph, and have no meaning in another one."""


@dataclass
class Segment:
    """A run of nodes that becomes one body: a block of the model, or what lies between blocks."""

    block: str
    nodes: list[fx.Node] = field(default_factory=list)


def outline(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Split the graph at the model's repeated blocks and call each distinct body where it stood.

    Blocks are found by ``nn_module_stack`` (the outermost ``...<list>.<index>``). Two blocks share a body
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
    if len([s for s in segments if s.block]) < 2:
        return PassResult(gm, False)  # nothing repeats: one flat graph is the simplest program
    return PassResult(build(gm, segments), True)


def block_of(node: fx.Node) -> str:
    match = INDEXED.match(node.meta.get("module", ""))
    return match.group(0) if match else ""


def split(graph: fx.Graph) -> list[Segment]:
    """Segments in execution order; empty if blocks depend on each other in a circle.

    A node outside of all blocks goes as early as its inputs allow, so that masks and rotary tables,
    which depend on no block, are computed once before the first. A value computed from stored tensors
    alone goes where it is first read instead: a dequantized weight must not be held meanwhile.
    """
    order: dict[str, int] = {}
    for node in graph.nodes:
        block = block_of(node)
        if block and node.op == "call_function":
            order.setdefault(block, len(order))
    level: dict[fx.Node, int] = {}  # outer segments have even levels, blocks odd ones
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        inputs = [level[n] for n in node.all_input_nodes if n in level]
        if node.target is operator.getitem and inputs:
            level[node] = inputs[0]  # bodies pass tensors to each other, not lists of them
            continue
        block = block_of(node)
        if block:
            own = 2 * order[block] + 1
            if any(i > own for i in inputs):
                return []
            level[node] = own
        else:
            level[node] = max(((i + 1) // 2 * 2 for i in inputs), default=0)
    for node in reversed(graph.nodes):
        listed = isinstance(node.meta.get("val"), (tuple, list)) or node.target is operator.getitem
        if (
            node in level
            and not block_of(node)
            and from_storage(node)
            and node.users
            and not listed
        ):
            level[node] = min(level.get(user, level[node]) for user in node.users)
    names = {2 * i + 1: block for block, i in order.items()}
    segments: dict[int, Segment] = {}
    for node, i in level.items():  # in graph order
        segments.setdefault(i, Segment(names.get(i, ""))).nodes.append(node)
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
    bodies: dict[Any, str] = {}
    parts = [Body(segment) for segment in segments]
    read = {n for part in parts for n in part.inputs if part.env[n].users}
    read |= set(output.all_input_nodes)
    for position, (segment, body) in enumerate(zip(segments, parts, strict=True)):
        body.finish([n for n in segment.nodes if n in read])
        if not body.outputs:
            continue
        key = body.key()
        if key not in bodies:
            bodies[key] = body_name(segment, position, len(segments), set(bodies.values()))
            root.add_module(bodies[key], fx.GraphModule(nn.Module(), body.graph, bodies[key]))
        emit_call(outer, bodies[key], body, segment, env)
    outer.output(fx.map_arg(output.args[0], lambda n: env[n]))
    result = fx.GraphModule(root, outer, type(gm).__name__)
    result.meta = dict(gm.meta)
    return result


def body_name(segment: Segment, position: int, total: int, taken: set[str]) -> str:
    """The block's class (``LlamaDecoderLayer``); ``prologue``, ``epilogue`` or ``between`` outside."""
    if segment.block:
        base = class_of(segment)
    else:
        base = "prologue" if position == 0 else "epilogue" if position == total - 1 else "between"
    name, n = base, 2
    while name in taken:
        name, n = f"{base}_{n}", n + 1
    return name


def class_of(segment: Segment) -> str:
    for node in segment.nodes:
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            if path == segment.block:
                text = cls if isinstance(cls, str) else cls.__name__
                return text.rsplit(".", 1)[-1]
    return "block"


def emit_call(
    outer: fx.Graph, name: str, body: Body, segment: Segment, env: dict[fx.Node, fx.Node]
) -> None:
    call_name = segment.block.replace(".", "_") if segment.block else name
    args = tuple(env[n] for n in body.inputs)
    call = outer.create_node("call_module", name, args, name=call_name)
    call.meta["module"] = segment.block
    vals = [n.meta["val"] for n in body.outputs]
    call.meta["val"] = vals[0] if len(vals) == 1 else tuple(vals)
    if len(vals) == 1:
        env[body.outputs[0]] = call
        return
    for i, node in enumerate(body.outputs):
        item = outer.create_node("call_function", operator.getitem, (call, i), name=node.name)
        item.meta.update(val=node.meta["val"], module=segment.block)
        env[node] = item


class Body:
    """A segment as a graph of its own; its inputs are what it reads from outside, in order of use.

    Symbolic sizes are read again from the body's own tensor inputs rather than passed, so that the body
    depends on tensors only.
    """

    def __init__(self, segment: Segment) -> None:
        self.prefix = segment.block
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.outputs: list[fx.Node] = []
        self.env: dict[fx.Node, fx.Node] = {}
        inside = set(segment.nodes)
        needed = [n for n in segment.nodes if not isinstance(n.meta["val"], torch.SymInt)]
        for node in needed:
            for arg in node.all_input_nodes:
                self.collect(arg, inside)
        for node in needed:
            self.copy(node)

    def finish(self, outputs: list[fx.Node]) -> None:
        """Return ``outputs``, nodes of the segment, and drop what they do not need."""
        self.outputs = outputs
        values = tuple(self.env[n] for n in outputs)
        self.graph.output(values[0] if len(values) == 1 else values)
        self.graph.eliminate_dead_code()
        self.drop_unused_inputs()

    def collect(self, node: fx.Node, inside: set[fx.Node]) -> None:
        """Make ``node`` an input if it comes from outside; symbolic numbers are followed to a tensor."""
        if isinstance(node.meta["val"], torch.SymInt):
            for arg in node.all_input_nodes:
                if not has_symbol(self.inputs, node):
                    self.collect(arg, inside)
            return
        if node in inside or node in self.env:
            return
        self.inputs.append(node)
        new = self.graph.create_node(
            "placeholder", self.local(node.name), name=self.local(node.name)
        )
        new.meta = {k: v for k, v in node.meta.items() if k in INPUT_META}
        if "stored" in node.meta:
            new.meta["body"] = node.meta["stored"].removeprefix(f"{self.prefix}.")
        self.env[node] = new

    def copy(self, node: fx.Node) -> fx.Node:
        args = fx.map_arg(node.args, self.translate)
        kwargs = fx.map_arg(dict(node.kwargs), self.translate)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=self.local(node.name))
        new.meta = {k: v for k, v in node.meta.items() if k not in OF_FLAT_GRAPH}
        self.env[node] = new
        return new

    def translate(self, node: fx.Node) -> Any:
        if node in self.env:
            return self.env[node]
        assert isinstance(node.meta["val"], torch.SymInt), node
        expr = node.meta["val"].node.expr
        for outer in self.inputs:
            inner = self.env[outer]
            for dim, size in enumerate(getattr(inner.meta["val"], "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    new = self.graph.create_node(
                        "call_function", aten.sym_size.int, (inner, dim), name="size"
                    )
                    new.meta = {**node.meta, "module": self.prefix}
                    self.env[node] = new
                    return new
        return self.copy(node)

    def drop_unused_inputs(self) -> None:
        kept = []
        for outer in self.inputs:
            inner = self.env[outer]
            if inner.users:
                kept.append(outer)
            else:
                self.graph.erase_node(inner)
        self.inputs = kept

    def local(self, name: str) -> str:
        prefix = self.prefix.replace(".", "_")
        return identifier(name.removeprefix(f"{prefix}_")) if prefix else name

    def key(self) -> Any:
        """Equal for two bodies that compute the same from inputs of the same types."""
        index = {node: i for i, node in enumerate(self.graph.nodes)}

        rows = []
        for node in self.graph.nodes:
            args = str(fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{index[n]}"))
            role = (node.meta.get("body"), node.meta.get("trainable"))
            rows.append(
                (
                    node.op,
                    str(node.target) if node.op == "call_function" else "",
                    args,
                    role if node.op == "placeholder" else None,
                    signature(node.meta.get("val")),
                )
            )
        return tuple(rows)


def has_symbol(inputs: Iterable[fx.Node], number: fx.Node) -> bool:
    expr = number.meta["val"].node.expr
    return any(
        isinstance(size, torch.SymInt) and size.node.expr == expr
        for n in inputs
        if isinstance(n.meta["val"], torch.Tensor)
        for size in n.meta["val"].shape
    )


def signature(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        return (val.dtype, tuple(map(str, val.shape)), tuple(map(str, val.stride())))
    if isinstance(val, (tuple, list)):
        return tuple(map(signature, val))
    return str(val)
