"""What a training step holds between forward and backward, read off the partitioned program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from ..compiler.programs import Programs
from ..compiler.recompute import Calls, Split, flows, free_sizes
from ..errors import ModelError
from ..passes.lowering.compiled_body import Key
from ..passes.lowering.live_bytes import value
from ..passes.lowering.partition import activations


@dataclass(frozen=True)
class Held:
    """One tensor of one body.

    Attributes:
        body: the block's class, ``prologue`` or ``epilogue``.
        calls: how many calls of the body hold a tensor of their own like this.
        name: of the node in the joint graph.
        bytes: of one call, at the sizes asked for.
        formula: bytes of one call in ``B`` (batch), ``S`` (sequence) and ``T`` (an encoder-decoder's target).
    """

    body: str
    calls: int
    name: str
    bytes: int
    formula: str


class Activations(list[Held]):
    """All that is held; prints as a table.

    Attributes:
        split: how many calls of each body are recomputed, and what that costs.
    """

    def __init__(self, split: Split) -> None:
        super().__init__()
        self.split = split

    @property
    def total(self) -> int:
        """Bytes of all calls of all bodies."""
        return sum(held.bytes * held.calls for held in self)

    @property
    def recomputation(self) -> float:
        """Products computed again, as a part of all products of the step; about the time that the budget costs."""
        return self.split.recomputation

    def per_call(self, body: str) -> int:
        """Bytes of one call that keeps everything."""
        return next((calls.held for calls in self.split.bodies if calls.name == body), 0)

    def __str__(self) -> str:
        lines = [f"{'body':24} {'calls':>5} {'MB a call':>10}  tensor"]
        for held in self:
            mb = held.bytes / 1e6
            lines.append(f"{held.body:24} {held.calls:5} {mb:10.3f}  {held.name}: {held.formula}")
        lines.append(f"{'all':24} {'':5} {self.total / 1e6:10.3f}")
        for calls in self.split.bodies:
            if calls.recomputed:
                lines.append(
                    f"{calls.recomputed} of {calls.calls} calls of {calls.name} keep only their inputs: "
                    f"{self.recomputation:.0%} of all products are computed again"
                )
        return "\n".join(lines)


def saved_activations(programs: Programs, *, batch_size: int, sequence_length: int) -> Activations:
    """The tensors held from forward to backward, from the partitioned joint graph of each body.

    Args:
        programs: of a model with backend "inductor" or "aot_eager". The memory budget they have is honoured.
        batch_size, sequence_length: sizes to evaluate for; any, not only those that ran. A decoder's rows have the
            encoder's length.

    Raises:
        ModelError: with backend "eager", whose program is not partitioned; with ``training=False`` before a training step.
    """
    for signature, several in programs.captured.items():
        for one in several:
            if not signature.training or not one.budget.bodies:
                continue
            inputs = [fake for _, fake in one.program.inputs]
            sizes = free_sizes(inputs, batch_size, sequence_length)
            letters = sympy.symbols("B S T U V W")
            names = dict(zip(sizes, letters, strict=False))
            rows = Activations(one.budget.split(sizes))
            for calls in rows.split.bodies:
                rows += rows_of(calls, sizes, names)
            return rows
    raise ModelError(
        "nothing is lowered for training; accepted: backend 'inductor' or 'aot_eager' (eager keeps what it likes), and a model "
        "that has had a training step if it was made with training=False"
    )


def rows_of(
    calls: Calls, sizes: dict[sympy.Expr, int], names: dict[sympy.Expr, sympy.Symbol]
) -> Iterator[Held]:
    body = calls.body
    for recompute, count in ((False, calls.calls - calls.recomputed), (True, calls.recomputed)):
        if not count:
            continue
        partition = body.partitioned(Key(body.flowing, recompute))
        for tensor, size in activations(partition, flows(body)):
            formula = str(sympy.sympify(size).xreplace(names))
            yield Held(calls.name, count, tensor, value(size, sizes), formula)
