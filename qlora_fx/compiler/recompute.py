"""``memory_budget``: how many calls of each block keep only their inputs for backward.

A block that keeps everything holds its products and its attention; one that keeps its inputs computes them again.
Calls are taken from the first block on: when backward comes to them, what the later ones held is free again, so
that computing them anew adds nothing to the peak.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from ..errors import users_stacklevel
from ..passes.lowering.compiled_body import CompiledBody, Key
from ..passes.lowering.live_bytes import value
from ..passes.lowering.operators import elements
from ..passes.lowering.partition import Partition, activations
from ..runtime.free_memory import free_bytes
from ..runtime.program import multiple

SHARE_OF_FREE = 0.8
"""Of free memory, where no budget is given: the rest is for what a step holds only for a moment."""


@dataclass(frozen=True)
class Calls:
    """One body at given sizes.

    Attributes:
        name: the block's class, ``prologue`` or ``epilogue``.
        calls: how often it is called.
        recomputed: how many of them keep only their inputs.
        held, inputs: bytes that one call holds, if it keeps everything and if it keeps its inputs; the same for
            what is no block.
        flops: of forward and backward of one call.
        again: flops that a recomputed call adds.
    """

    name: str
    body: CompiledBody
    calls: int
    held: int
    inputs: int
    flops: int
    again: int
    recomputed: int = 0

    @property
    def bytes(self) -> int:
        return self.held * (self.calls - self.recomputed) + self.inputs * self.recomputed


@dataclass(frozen=True)
class Split:
    """What one step holds from forward to backward, and computes twice for it.

    Attributes:
        bodies: in the order of the program.
        budget: bytes; None where all that is free was more than enough.
    """

    bodies: list[Calls] = field(default_factory=list)
    budget: int | None = None

    @property
    def bytes(self) -> int:
        return sum(calls.bytes for calls in self.bodies)

    @property
    def recomputation(self) -> float:
        """Products computed again, as a part of all products of the step."""
        again = sum(c.again * c.recomputed for c in self.bodies)
        return again / max(1, sum(c.flops * c.calls for c in self.bodies))


class Budget:
    """The memory budget of one program.

    Args:
        run: the lowered graph.
        memory_budget: as ``request.check_memory_budget`` returns it.
        device: where activations live.
    """

    def __init__(
        self, run: fx.GraphModule, memory_budget: int | float | None, device: torch.device
    ) -> None:
        self.bodies = [(n, b) for n, b in run.named_children() if isinstance(b, CompiledBody)]
        self.memory_budget, self.device = memory_budget, device
        self.chosen: dict[tuple[Any, ...], dict[CompiledBody, int]] = {}
        self.warned = False

    def change(self, memory_budget: int | float | None) -> None:
        """Decide anew, from another budget."""
        self.memory_budget = memory_budget
        self.chosen.clear()
        for _, body in self.bodies:
            body.recomputed = 0

    def prepare(self, sizes: Mapping[sympy.Expr, int]) -> None:
        """Set how many calls of each body are recomputed at these sizes; called before each training step."""
        if not torch.is_grad_enabled() or not self.bodies:
            return
        key = tuple(sizes.values())
        chosen = self.chosen.get(key)
        if chosen is None:
            chosen = self.chosen[key] = self.choose(sizes)
        for body, count in chosen.items():
            body.recomputed = count

    def choose(self, sizes: Mapping[sympy.Expr, int]) -> dict[CompiledBody, int]:
        if self.keeps_everything(sizes):
            return {body: 0 for _, body in self.bodies}
        split = self.split(sizes)
        if split.budget is not None and split.bytes > split.budget and not self.warned:
            self.warned = True
            warnings.warn(
                f"memory_budget: {split.budget / 1e6:.0f} MB are not enough for this batch; {split.bytes / 1e6:.0f} MB "
                "are held with every block recomputed. Accepted: a smaller batch or shorter rows",
                stacklevel=users_stacklevel(),
            )
        return {calls.body: calls.recomputed for calls in split.bodies}

    def keeps_everything(self, sizes: Mapping[sympy.Expr, int]) -> bool:
        """True where that is plain before any body is traced."""
        if isinstance(self.memory_budget, float):
            return self.memory_budget == 1.0
        limit = self.memory_budget or SHARE_OF_FREE * free_bytes(self.device)
        return sum(body.calls * everything(body, sizes) for _, body in self.bodies) < limit

    def split(self, sizes: Mapping[sympy.Expr, int]) -> Split:
        """The calls to recompute, those with the fewest operations per byte first, until the rest fits."""
        known = [measured(name, body, sizes) for name, body in self.bodies]
        whole = sum(c.bytes for c in known)
        if self.memory_budget is None:
            limit = int(SHARE_OF_FREE * free_bytes(self.device))
        elif isinstance(self.memory_budget, float):
            least = sum(min(c.held, c.inputs) * c.calls for c in known)
            limit = max(int(self.memory_budget * whole), least)
        else:
            limit = self.memory_budget
        excess = whole - limit
        counts: dict[str, int] = {}
        worth = [c for c in known if c.held > c.inputs]
        for c in sorted(worth, key=lambda c: c.again / (c.held - c.inputs)):
            gain = c.held - c.inputs
            counts[c.name] = min(c.calls, max(0, -(-excess // gain)))
            excess -= counts[c.name] * gain
        bodies = [
            Calls(
                c.name, c.body, c.calls, c.held, c.inputs, c.flops, c.again, counts.get(c.name, 0)
            )
            for c in known
        ]
        return Split(bodies, limit)


def free_sizes(
    inputs: Iterable[torch.Tensor], batch_size: int, sequence_length: int
) -> dict[sympy.Expr, int]:
    """The capture's symbols for a batch: rows of all inputs, encoder's and decoder's, have ``sequence_length``.

    Pictures have the sizes that they were captured with.

    Args:
        inputs: fake values of the program's inputs.
    """
    found: dict[sympy.Expr, int] = {}
    for tensor in inputs:
        for dim, size in enumerate(tensor.shape):
            if not isinstance(size, torch.SymInt):
                continue
            times, symbol = multiple(size.node.expr)
            if times > 1:
                found.setdefault(symbol, size.node.hint // times)
            elif symbol is not None:
                found.setdefault(symbol, sequence_length if dim else batch_size)
    return found


def measured(name: str, body: CompiledBody, sizes: Mapping[sympy.Expr, int]) -> Calls:
    kept = body.partitioned(Key(body.flowing))
    flowing = flows(body)
    held = total(kept, flowing, sizes)
    inputs, again = held, 0
    if body.block and any(body.flowing):
        anew = body.partitioned(Key(body.flowing, True))
        inputs = total(anew, flowing, sizes)
        again = value(anew.flops[1] - kept.flops[1], sizes)
    flops = value(kept.flops[0] + kept.flops[1], sizes)
    return Calls(name, body, body.calls, held, inputs, flops, again)


def flows(body: CompiledBody) -> tuple[bool, ...]:
    """Which inputs of a body are activations that are held because of it."""
    return tuple(
        flowing and "stored" not in node.meta
        for flowing, node in zip(body.flowing, body.inputs, strict=True)
    )


def total(partition: Partition, flowing: tuple[bool, ...], sizes: Mapping[sympy.Expr, int]) -> int:
    return sum(value(size, sizes) for _, size in activations(partition, flowing))


def everything(body: CompiledBody, sizes: Mapping[sympy.Expr, int]) -> int:
    """Bytes of all values that depend on the input: more than any partition holds, and known without tracing."""
    return sum(value(elements(val) * val.element_size(), sizes) for val in values(body))


def values(body: CompiledBody) -> Iterator[torch.Tensor]:
    stored: set[fx.Node] = set()  # computed from weights alone
    for node in body.body.graph.nodes:
        if node.op == "placeholder":
            stored |= {node} if "stored" in node.meta else set()
            continue
        if node.all_input_nodes and all(n in stored for n in node.all_input_nodes):
            stored.add(node)
            continue
        val = node.meta.get("val")
        if node.op == "call_function" and isinstance(val, torch.Tensor):
            yield val
