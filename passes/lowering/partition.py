"""The part of lower that splits a joint graph: what the forward keeps for the backward.

# Note [What is recomputed]
The rule is by provenance, not by op: in the joint graph, a node of the forward all of whose inputs lead
back to stored placeholders (weights, absmax, maps, lora_A) is a function of what is stored. It is always
cheaper to keep that, which lives anyway, than a dense weight or a stack of factors. So such nodes are
recomputed.

Of what depends on the input, products, attention and reductions are kept, and everything pointwise is
computed again, however long the chain: reading a tensor back costs about what computing it costs from one
that is read anyway.

Under a memory budget (qlora_fx/memory/recompute.py) some calls of a block keep their inputs only, as with gradient
checkpointing. Products and attention of one block all cost about as many operations per byte that they would
keep (2 x in_features for a product), so nothing is gained by choosing among them: whole calls are chosen. Random
numbers are always kept, for drawn again they would be others.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import fx
from torch._functorch import config as functorch
from torch._functorch import partitioners
from torch._inductor.custom_graph_pass import CustomPartitionerFn, get_hash_for_files
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils.checkpoint import CheckpointPolicy

from ..graph.nodes import CASTS, VIEWS_AND_CASTS
from .live_bytes import COPIES, Event, events
from .operators import ZERO, elements, operator_of


class Partition(CustomPartitionerFn):  # type: ignore[misc]
    """Splits a joint graph into forward and backward. Note [What is recomputed].

    Args:
        held: positions of inputs that are parameters or storage, which live anyway.
        activations: positions of inputs that are held because of this body. Other inputs (masks, rotary tables)
            live through the step anyway.
        recompute: keep nothing but the inputs and what was drawn at random.

    Attributes:
        other: is shown the same joint graph, before.
        saved: what the forward hands to the backward, once it has run.
        inputs: the forward's inputs, in order.
        symbols: the capture's free sizes, by those that the graph was traced with.
        live: what the forward and the backward add to what is live, node by node.
        flops: multiplications and additions of the forward's products and of the backward's, in the capture's
            symbols.
    """

    def __init__(
        self,
        held: frozenset[int],
        activations: frozenset[int] = frozenset(),
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.held, self.activations = held, activations
        self.recompute = recompute
        self.other: Partition | None = None
        self.saved: list[fx.Node] = []
        self.inputs: list[fx.Node] = []
        self.symbols: dict[sympy.Symbol, sympy.Expr] = {}
        self.live: tuple[list[Event], list[Event]] = ([], [])
        self.flops: tuple[sympy.Expr, sympy.Expr] = (sympy.Integer(0), sympy.Integer(0))

    def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        if self.other is not None:
            self.other(copied(gm), joint_inputs, **kwargs)
        mark_recompute(gm.graph, self.held)
        if self.recompute:
            mark_all_recompute(gm.graph)
        with functorch.patch(CHEAP_IS_RECOMPUTED):
            forward, backward = partitioners.min_cut_rematerialization_partition(
                gm, joint_inputs, **kwargs
            )
        outputs: Any = next(iter(forward.graph.find_nodes(op="output"))).args[0]
        self.saved = [n for n in outputs[kwargs["num_fwd_outputs"] :] if isinstance(n, fx.Node)]
        self.inputs = list(forward.graph.find_nodes(op="placeholder"))
        self.flops = tuple(self.captured(flops_of(g.graph)) for g in (forward, backward))
        transient = self.transient(backward.graph)
        self.live = (self.events(forward.graph, ()), self.events(backward.graph, transient))
        return forward, backward

    def beside(self, recompute: bool) -> Partition:
        """Another way to split the same joint graph."""
        other = Partition(self.held, self.activations, recompute=recompute)
        other.symbols = self.symbols
        return other

    def captured(self, formula: Any) -> sympy.Expr:
        """A formula over sizes in the symbols of the capture."""
        return sympy.sympify(formula).xreplace(self.symbols)

    def events(self, graph: fx.Graph, transient: Iterable[fx.Node]) -> list[Event]:
        """``live_bytes.events`` in the symbols of the capture."""
        return [
            Event(e.node, self.captured(e.bytes), self.captured(e.moment))
            for e in events(graph, transient)
        ]

    def transient(self, backward: fx.Graph) -> list[fx.Node]:
        """What comes into the backward and goes with it: saved values that are the body's, and gradients."""
        others = {n.name for i, n in enumerate(self.inputs) if i not in self.activations}
        return [n for n in backward.find_nodes(op="placeholder") if n.name not in others]

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,), extra=f"{sorted(self.held)} {self.recompute}")

    # Inductor copies its settings and pickles them for its cache key: without what was saved.
    def __deepcopy__(self, memo: Any) -> Partition:
        return self

    def __getstate__(self) -> Any:
        return self.uuid()


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph with marks of its own."""
    graph = fx.Graph()
    at: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        at[node] = graph.node_copy(node, at.__getitem__)
    return fx.GraphModule(gm, graph)


CHEAP_IS_RECOMPUTED = {
    "ban_recompute_used_far_apart": False,
    "ban_recompute_long_fusible_chains": False,
    "ban_recompute_materialized_backward": False,
}
"""Pointwise chains are recomputed however far or long they are: products and attention are what is kept."""


def mark_recompute(joint: fx.Graph, held: frozenset[int]) -> int:
    """Tag forward nodes computed from parameters and storage alone; returns how many were tagged.

    Args:
        joint: AOTAutograd's joint graph; its first placeholders are the body's inputs in order.
        held: positions of inputs that are parameters or storage, which live anyway.
    """
    from_stored: set[fx.Node] = set()
    tagged = 0
    primals = [n for n in joint.find_nodes(op="placeholder") if "tangents" not in str(n.target)]
    for i, node in enumerate(primals):
        if i in held:
            from_stored.add(node)
    for node in joint.nodes:
        if node.op != "call_function" or not node.all_input_nodes:
            continue
        if all(n in from_stored for n in node.all_input_nodes):
            from_stored.add(node)
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 0
            tagged += 1
    return tagged


def mark_all_recompute(joint: fx.Graph) -> None:
    """Tag every node of the forward: to be computed again, or kept where that would give other values."""
    later = {n for n in joint.find_nodes(op="placeholder") if "tangents" in str(n.target)}
    for node in joint.nodes:
        if node.op != "call_function":
            continue
        if any(n in later for n in node.all_input_nodes):
            later.add(node)
            continue
        if isinstance(node.meta.get("val"), (tuple, list)) and is_random(node):
            continue  # what is taken out of it is kept
        source = node.args[0] if node.target is operator.getitem else node
        keep = is_random(source) or has_size_of_its_own(node)
        node.meta["recompute"] = (
            CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.MUST_RECOMPUTE
        )
        node.meta["ac_graph_id"] = 0


def is_random(node: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def has_size_of_its_own(node: fx.Node) -> bool:
    """True where the data decided a size: computed again it would be another symbol."""
    val = node.meta.get("val")
    sizes = val.shape if isinstance(val, torch.Tensor) else (val,)
    return any(isinstance(s, torch.SymInt) and free_unbacked_symbols(s) for s in sizes)


def activations(partition: Partition, flowing: tuple[bool, ...]) -> list[tuple[str, sympy.Expr]]:
    """Name and bytes of each tensor that is held from forward to backward because of the input.

    Views of one tensor count once; parameters and storage, which live anyway, do not.

    Args:
        partition: after the body was compiled.
        flowing: which inputs of the body are activations of its own, as the output of the block before.
    """
    inputs = {n for n, flows in zip(partition.inputs, flowing, strict=False) if flows}
    found: dict[fx.Node, sympy.Expr] = {}
    for node in partition.saved:
        base = base_of(node)
        val = base.meta["val"]
        if isinstance(val, torch.Tensor) and (base.op != "placeholder" or base in inputs):
            found[base] = partition.captured(elements(val) * val.element_size())
    return [(node.name, size) for node, size in found.items()]


def flops_of(graph: fx.Graph) -> sympy.Expr:
    """Multiplications and additions of the graph's products, in the symbols it was traced with."""
    calls = (node for node in graph.nodes if node.op == "call_function")
    return sum((operator_of(node).flops(node) for node in calls), ZERO)


def base_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    views = VIEWS_AND_CASTS - CASTS - COPIES
    while node.target in views and isinstance(node.meta.get("val"), torch.Tensor):
        source = node.args[0]
        if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
            break
        node = source
    return node
