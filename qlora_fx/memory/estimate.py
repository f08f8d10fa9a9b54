"""A model traced for planning: bytes of a training step at any sizes, read off its graphs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import fx
from transformers import PreTrainedModel

from ..compiler.compile import Prepared, prepare
from ..compiler.recompute import Budget, Calls, Split, free_sizes
from ..compiler.request import Request
from ..passes.lower import lower
from ..passes.lowering.compiled_body import Key
from ..passes.lowering.live_bytes import events, peak, size_of, value
from ..passes.lowering.operators import ON_GPU
from ..runtime.flat_update import LENGTH
from .report import Moment, Plan
from .resident import footprint

UPDATE = 4
"""Float32 temporaries, each of one run of parameters, that an update of 32-bit state takes on a CPU."""


@dataclass
class Draft:
    """A model that is prepared for planning: traced once, evaluated for any sizes.

    Attributes:
        prepared: without weights.
        outer: the lowered program.
        on_gpu: whether it is planned for one.
    """

    prepared: Prepared
    outer: fx.GraphModule
    on_gpu: bool

    def plan(
        self, *, batch_size: int, sequence_length: int, optimizer: str, memory_budget: int | float
    ) -> Plan:
        nodes = self.prepared.result.gm.graph.find_nodes(op="placeholder")
        inputs = [n.meta["val"] for n in nodes if "input" in n.meta]
        sizes = free_sizes(inputs, batch_size, sequence_length) | {ON_GPU: int(self.on_gpu)}
        base = self.prepared.base
        split = Budget(self.outer, memory_budget, base.device).split(sizes)
        held = footprint(self.prepared, optimizer)
        config = base.config
        settings = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "r": config.lora.r,
            "optimizer": optimizer,
            "memory_budget": memory_budget,
            "dtype": str(config.compute_dtype).removeprefix("torch."),
        }
        timeline = self.timeline(split, sizes)
        flat = held.adapters // 4
        timeline.append(Moment("optimizer", 0, 4 * UPDATE * min(LENGTH, flat)))
        return Plan(base.skeleton.name, settings, held, timeline, split)

    def timeline(self, split: Split, sizes: Mapping[sympy.Expr, int]) -> list[Moment]:
        """Forward through the program's calls, and back."""
        known = {calls.name: calls for calls in split.bodies}
        numbers: dict[str, int] = {}
        steps: list[
            tuple[str, int, int, int]
        ] = []  # place, held, forward's and backward's working bytes
        memo: dict[tuple[str, bool], tuple[int, int, int]] = {}
        for node in self.outer.graph.nodes:
            if node.op != "call_module":
                continue
            calls = known[str(node.target)]
            number = numbers[calls.name] = numbers.get(calls.name, -1) + 1
            key = (calls.name, number < calls.recomputed)
            if key not in memo:
                memo[key] = working(calls, key[1], sizes)
            place = str(node.meta.get("module") or calls.name)
            steps.append((place, *memo[key]))
        moments = []
        held = self.shared(sizes)
        for place, own, ahead, _ in steps:
            moments.append(Moment(f"forward {place}", held, ahead))
            held += own
        for place, own, _, back in reversed(steps):
            held -= own
            if back:
                # What this call saved is freed as its backward goes on: counted in its working bytes.
                moments.append(Moment(f"backward {place}", held, back))
        return moments

    def shared(self, sizes: Mapping[sympy.Expr, int]) -> int:
        """Bytes that several calls read, and live through the step: masks and rotary tables.

        What one call reads is counted with what that call saves.
        """
        nodes = [n for n in self.outer.graph.nodes if n.op == "call_module" or is_item(n)]
        several = [n for n in nodes if len([u for u in n.users if not is_item(u)]) > 1]
        return sum(value(size_of(n), sizes) for n in several)


def is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def working(calls: Calls, recompute: bool, sizes: Mapping[sympy.Expr, int]) -> tuple[int, int, int]:
    """Bytes that a call leaves for backward, and the most it has live in forward and in backward."""
    body = calls.body
    if not any(body.flowing):  # nothing below an adapter is split
        return 0, peak(events(body.body.graph, ()), sizes), 0
    partition = body.partitioned(Key(body.flowing, recompute))
    forward, backward = (peak(changes, sizes) for changes in partition.live)
    return (calls.inputs if recompute else calls.held), forward, backward


def draft(model: PreTrainedModel, request: Request, on_gpu: bool) -> Draft:
    """Trace a model without weights up to its split program. On a CPU, whatever it is planned for."""
    prepared = prepare(model, request, torch.device("cpu"))
    return Draft(prepared, lower(prepared.result.gm, backend="aot_eager"), on_gpu)
