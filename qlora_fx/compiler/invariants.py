"""What each stage establishes, as named checks. They only accumulate: each holds after all later stages.

A check yields ``(node, fault, remedy)`` for every violation; the pipeline turns the first into a
``GraphError`` with the graph around the node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ..config import Config
from ..passes.adapt import has_branch, is_adapter_key
from ..passes.graph.nodes import (
    CANONICAL,
    is_packed,
    parameter_behind,
    sites,
    verdict_of,
)
from ..passes.graph.site import Site, Verdict
from ..passes.graph.values import computed_value
from ..passes.linears.spellings import recognise
from ..passes.quantize import reads_storage

Violation = tuple[fx.Node | None, str, str]
Invariant = Callable[[fx.GraphModule, Config], Iterator[Violation]]


def every_node_has_a_value(gm: fx.GraphModule, config: Config) -> Iterator[Violation]:
    """Every node that computes or feeds something has ``meta["val"]``."""
    for node in gm.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield node, "has no meta['val']", "create nodes with passes.graph.nodes.call"


def graph_holds_no_tensor(gm: fx.GraphModule, config: Config) -> Iterator[Violation]:
    """Weights come in through placeholders; the graph module itself owns none."""
    for node in gm.graph.find_nodes(op="get_attr"):
        yield node, "reads a tensor held by the graph", "use passes.graph.nodes.StoredInputs"
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        yield (
            None,
            f"the graph module holds the tensor {name}",
            "keep tensors in the parameter store",
        )


def only_canonical_linears_multiply_by_weights(
    gm: fx.GraphModule, config: Config
) -> Iterator[Violation]:
    """No other spelling that normalize knows reads a weight; what it does not know is select's to report."""
    for node in gm.graph.nodes:
        product = recognise(node)
        if product is not None:
            weight = parameter_behind(product.weight)
            assert weight is not None
            yield (
                node,
                f"multiplies by {weight.name} outside of aten.linear and qlora_fx.grouped_linear",
                "extend normalize",
            )


def every_linear_has_a_verdict(gm: fx.GraphModule, config: Config) -> Iterator[Violation]:
    """Each linear of the model carries a verdict; a negative one has a reason."""
    for node in gm.graph.nodes:
        if node.target not in CANONICAL or is_lora_product(node):
            continue
        verdict = verdict_of(node)
        if verdict is None:
            yield node, "has no verdict", "select must mark every linear"
        elif not verdict.reason and not is_positive(verdict):
            yield node, "is left out without a reason", "select must say why"


def is_positive(verdict: Verdict) -> bool:
    return isinstance(verdict, Site) and verdict.quantize and verdict.adapt


def is_lora_product(node: fx.Node) -> bool:
    weight = parameter_behind(node.args[1])
    return "stack_of" in node.meta or (weight is not None and is_adapter(weight))


def is_adapter(placeholder: fx.Node) -> bool:
    return is_adapter_key(placeholder.meta.get("stored", ""))


def no_dense_copy_of_a_selected_weight(gm: fx.GraphModule, config: Config) -> Iterator[Violation]:
    """A selected weight is readable from its storage only."""
    for node in sites(gm.graph):
        if node.meta["site"].quantize and not reads_storage(node):
            yield node, "is selected but reads a dense weight", "quantize must rewrite it"
    selected = {n.meta["site"].weight for n in sites(gm.graph) if n.meta["site"].quantize}
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.meta.get("stored") in selected and not is_packed(node):
            yield (
                node,
                "is a dense copy of a selected weight",
                "erase it once its readers are rewritten",
            )


def only_adapters_are_trainable(gm: fx.GraphModule, config: Config) -> Iterator[Violation]:
    """Only ``lora_A`` and ``lora_B`` are trainable."""
    for node in gm.graph.find_nodes(op="placeholder"):
        if node.meta.get("trainable", False) != is_adapter(node):
            yield node, "is trainable but no adapter, or an adapter and frozen", "mark it in adapt"


def every_adapted_site_has_a_live_branch(gm: fx.GraphModule, config: Config) -> Iterator[Violation]:
    """The branch's sum is what the rest of the graph reads."""
    for node in sites(gm.graph):
        if not node.meta["site"].adapt or not config.adapter:
            continue
        if not has_branch(node):
            yield node, "has no LoRA branch", "adapt must add it"
    for node in gm.graph.nodes:
        if "branch_of" in node.meta and not node.users:
            yield (
                node,
                "is a LoRA branch that nobody reads",
                "replace all uses of the site's result",
            )


def each_distinct_body_occurs_once(gm: fx.GraphModule, config: Config) -> Iterator[Violation]:
    """No two called bodies have the same printed code and types."""
    seen: dict[Any, str] = {}
    for name, body in gm.named_children():
        if not isinstance(body, fx.GraphModule):
            continue
        rows = [
            (
                n.op,
                str(n.target) if n.op == "call_function" else "",
                n.meta.get("body"),
                str(n.meta.get("val")),
            )
            for n in body.graph.nodes
        ]
        key = tuple(rows) + (body.code.split(":", 1)[1],)
        if key in seen:
            yield None, f"bodies {seen[key]} and {name} are the same", "share one body in outline"
        seen[key] = name


def values_match_fake_kernels(gm: fx.GraphModule) -> Iterator[Violation]:
    """Every call's ``meta["val"]`` is what its fake kernel computes now. Slow: for tests."""
    for node in gm.graph.nodes:
        val = node.meta.get("val")
        if node.op != "call_function" or not isinstance(val, torch.Tensor):
            continue
        if node.target is operator.getitem:
            continue
        new = computed_value(val.fake_mode, node.target, node.args, node.kwargs)  # type: ignore[attr-defined]
        if new.dtype != val.dtype or [str(s) for s in new.shape] != [str(s) for s in val.shape]:
            yield (
                node,
                f"meta['val'] is {val.dtype}{list(val.shape)}, its kernel gives {new.dtype}{list(new.shape)}",
                "compute metadata, never alias it",
            )
