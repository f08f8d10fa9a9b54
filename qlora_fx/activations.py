"""What a training step holds between forward and backward, read off the compiled program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy
import torch

from .errors import ModelError
from .passes.lower import CompiledBody
from .passes.partition import activations

if TYPE_CHECKING:
    from .model import QLoRAModel


@dataclass(frozen=True)
class Held:
    """One tensor of one body.

    Attributes:
        body: the block's class, ``prologue`` or ``epilogue``.
        calls: how often the body is called, each time holding a tensor of its own.
        name: of the node in the joint graph.
        bytes: of one call, at the sizes asked for.
        formula: bytes of one call in ``B`` (batch) and ``S`` (sequence).
    """

    body: str
    calls: int
    name: str
    bytes: int
    formula: str


class Activations(list[Held]):
    """All that is held; prints as a table."""

    @property
    def total(self) -> int:
        """Bytes of all calls of all bodies."""
        return sum(held.bytes * held.calls for held in self)

    def per_call(self, body: str) -> int:
        return sum(held.bytes for held in self if held.body == body)

    def __str__(self) -> str:
        lines = [f"{'body':24} {'calls':>5} {'MB a call':>10}  tensor"]
        for held in self:
            mb = held.bytes / 1e6
            lines.append(f"{held.body:24} {held.calls:5} {mb:10.3f}  {held.name}: {held.formula}")
        lines.append(f"{'all':24} {'':5} {self.total / 1e6:10.3f}")
        return "\n".join(lines)


def saved_activations(qmodel: QLoRAModel, *, batch_size: int, sequence_length: int) -> Activations:
    """The tensors held from forward to backward, from the partitioned joint graph of each body.

    Args:
        qmodel: after one training step, with backend "inductor" or "aot_eager".
        batch_size, sequence_length: sizes to evaluate for; any, not only those that ran.

    Raises:
        ModelError: if no training step was compiled yet.
    """
    rows = Activations()
    for key, programs in qmodel._programs.items():
        if not key.training:
            continue
        for program in programs:
            shape: Any = program.inputs[0][1].shape
            pairs = zip(shape, (batch_size, sequence_length), strict=False)
            values: dict[Any, int] = {
                s.node.expr: n for s, n in pairs if isinstance(s, torch.SymInt)
            }
            names = dict(zip(values, sympy.symbols("B S"), strict=False))
            for name, body in getattr(program.run, "named_children", lambda: iter(()))():
                if isinstance(body, CompiledBody):
                    calls = len(list(program.run.graph.find_nodes(op="call_module", target=name)))  # type: ignore[attr-defined]
                    rows += rows_of(name, body, calls, values, names)
    if not rows:
        raise ModelError(
            "nothing is compiled for training yet; run one training step with backend 'inductor' or 'aot_eager' first"
        )
    return rows


def rows_of(
    name: str,
    body: CompiledBody,
    calls: int,
    values: dict[sympy.Expr, int],
    names: dict[sympy.Expr, sympy.Symbol],
) -> Iterator[Held]:
    for needs_grad in list(body.partitions):
        flowing = tuple(
            need and "stored" not in node.meta
            for need, node in zip(needs_grad, body.inputs, strict=False)
        )
        for tensor, size in activations(body.partitioned(needs_grad), flowing):
            number = int(sympy.sympify(size).xreplace(values))
            yield Held(name, calls, tensor, number, str(sympy.sympify(size).xreplace(names)))
