"""Which parts of a program are recorded as CUDA graphs: runs of blocks.

What waits for the device cannot be recorded: what a mask is (``qlora_fx::mask_kind``, in the prologue) and which rows have
a label (``qlora_fx::linear_cross_entropy``, in the epilogue). Between them all is launching.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import TypeVar

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from ...errors import GraphError
from ...runtime.cuda_graphs import Graphed, Places, Recorder
from ..graph.nodes import arguments, is_from_cache
from .compiled_body import CompiledBody
from .operators import waits

T = TypeVar("T")


def recorded(
    run: fx.GraphModule,
    device: torch.device,
    read_at_once: Collection[int] = (),
    recorder: Callable[[], Recorder] | None = None,
) -> fx.GraphModule | None:
    """The program with its blocks recorded; None where it has none that can be.

    Args:
        run: the lowered graph; its bodies are shared.
        read_at_once: positions of its results that nobody reads after the next call.
        recorder: default: ``Recorder`` on ``device``.
    """
    groups = list(parts(run))
    returned = run.graph.output_node().args[0]
    assert isinstance(returned, (tuple, list))
    kept = {node for i, node in enumerate(returned) if i not in read_at_once}
    if not any(is_recorded for is_recorded, _ in groups):
        return None
    outer, top, root = run.graph, fx.Graph(), nn.Module()
    at: dict[fx.Node, fx.Node] = {}
    for node in outer.nodes:
        if node.op == "placeholder" or is_size(node):
            at[node] = top.node_copy(node, at.__getitem__)
    for number, (is_recorded, members) in enumerate(groups):
        inside = set(members)
        inputs = unique(n for m in members for n in m.all_input_nodes if n not in inside)
        results = [m for m in members if any(user not in inside for user in m.users)]
        name = f"part_{number}"
        part: nn.Module = cut(run, members, inputs, results)
        if is_recorded:
            bodies = (getattr(run, str(m.target)) for m in members if m.op == "call_module")
            part = Graphed(
                part,
                Places(
                    stored=["stored" in n.meta for n in inputs],
                    cached=[i for i, n in enumerate(inputs) if is_from_cache(n)],
                    read_at_once=[
                        n not in kept and all(u.op == "output" for u in n.users) for n in results
                    ],
                ),
                partial(how_many_are_recomputed, unique(bodies)),
                recorder or (lambda: Recorder(device)),
            )
        root.add_module(name, part)
        call = top.call_module(name, tuple(at[n] for n in inputs))
        for i, node in enumerate(results):
            at[node] = top.call_function(operator.getitem, (call, i))
    top.output(fx.map_arg(outer.output_node().args[0], at.__getitem__))
    return fx.GraphModule(root, top, type(run).__name__)


def forget(program: nn.Module) -> None:
    """Give up what was recorded of a program, and its memory."""
    for part in program.children():
        if isinstance(part, Graphed):
            part.forget()


def how_many_are_recomputed(bodies: Sequence[CompiledBody]) -> tuple[int, ...]:
    return tuple(body.recomputed for body in bodies)


def parts(run: fx.GraphModule) -> Iterator[tuple[bool, list[fx.Node]]]:
    """The calls of the program in their order, in runs of those that are recorded and of others."""
    calls = [n for n in run.graph.nodes if n.op == "call_module"]
    bodies = [getattr(run, str(n.target)) for n in calls]
    can = {body: can_be_recorded(body) for body in bodies}
    often = [can[body] and body.calls > 1 for body in bodies]
    chosen = [False] * len(calls)
    for first, _ in enumerate(calls):
        last = first
        while often[first] and last < len(calls) and can[bodies[last]]:
            if often[last]:  # what is called once is recorded between blocks only
                chosen[first : last + 1] = [True] * (last + 1 - first)
            last += 1
    taken_from: dict[fx.Node, list[fx.Node]] = {call: [] for call in calls}
    for node in run.graph.nodes:
        if node.op == "call_function" and not is_size(node):
            if node.target is not operator.getitem or node.args[0] not in taken_from:
                raise GraphError(f"{node.format_node()} stands between the bodies of a program")
            taken_from[node.args[0]].append(node)
    for is_recorded, several in groupby(zip(chosen, calls, strict=True), lambda pair: pair[0]):
        yield is_recorded, [n for _, call in several for n in (call, *taken_from[call])]


def can_be_recorded(body: CompiledBody) -> bool:
    """Nothing in it waits for the device or writes to what it is given, and nothing but numbers is computed elsewhere."""
    nodes = list(body.body.graph.nodes)
    vals = [n.meta["val"] for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    device = max((v.device.type for v in vals), default="cpu")  # "cuda" is more than "cpu"
    return not any(waits(n) or writes_to_an_input(n) for n in nodes) and all(
        v.device.type == device or not v.dim() for v in vals
    )


def writes_to_an_input(node: fx.Node) -> bool:
    """True if a call writes to what its graph was given, be it through views."""
    return any(lies_in_an_input(n) for n in shared(node, written=True))


def lies_in_an_input(node: fx.Node) -> bool:
    """True for an input, its views, and what an operator may return as it was given."""
    return node.op == "placeholder" or any(map(lies_in_an_input, shared(node)))


def shared(node: fx.Node, written: bool = False) -> list[fx.Node]:
    """Arguments whose memory the result may lie in, or which are written."""
    if node.target is operator.getitem:
        return [] if written else list(node.all_input_nodes)
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    given = arguments(node)
    known = [a for a in node.target._schema.arguments if a.alias_info is not None]
    found = pytree.tree_leaves([given[a.name] for a in known if a.is_write or not written])
    return [n for n in found if isinstance(n, fx.Node)]


def is_size(node: fx.Node) -> bool:
    """A size of an input of the program, or what is worked out from such."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return node.target is torch.ops.aten.sym_size.int or (
        bool(node.all_input_nodes) and all(map(is_size, node.all_input_nodes))
    )


def cut(
    run: fx.GraphModule,
    members: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    results: Sequence[fx.Node],
) -> fx.GraphModule:
    """These nodes as a graph of their own."""
    graph = fx.Graph()
    at = {node: graph.placeholder(node.name) for node in inputs}
    for node in members:
        at[node] = graph.node_copy(node, at.__getitem__)
    graph.output(tuple(at[node] for node in results))
    return fx.GraphModule(run, graph)


def unique(found: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(found))
