"""One captured signature, ready to run: checks a call against the capture, feeds the graph, rebuilds the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import sympy
import torch
from torch import nn
from torch.utils import _pytree as pytree

from .allocator import give_back


class DoesNotFit(Exception):
    """The call's tensors are outside of what this program was captured for.

    Attributes:
        name: of the input whose size it is; None for a guard.
    """

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


def holds(guard: Any, values: Mapping[str, Any]) -> bool:
    """Whether an expression over ``L[name]``, as text or compiled, is true of a call's tensors."""
    return bool(eval(guard, {"L": values, "torch": torch, "math": math}))


class Program:
    """A callable for one signature.

    Args:
        run: the lowered graph; takes the stored tensors, then the inputs, in order.
        stored: store key and tensor of each stored input, in the graph's order.
        inputs: name, fake value (dtype and symbolic shape) of each input, in the graph's order.
        guards: Python expressions over ``L[name]`` that the capture relied on.
        out_spec: pytree spec of the model's output class.

    Attributes:
        prepare: called before each run with the call's free sizes, by symbol.
        graphed: ``run`` with parts recorded as CUDA graphs, where that was asked for.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        stored: list[tuple[str, torch.Tensor]],
        inputs: list[tuple[str, torch.Tensor]],
        guards: list[str],
        out_spec: pytree.TreeSpec,
    ) -> None:
        self.run = run
        self.keys = [key for key, _ in stored]
        self.stored = [tensor for _, tensor in stored]
        self.inputs = inputs
        self.shapes = [(name, [size_of(size) for size in val.shape]) for name, val in inputs]
        self.guards = guards
        together = " and ".join(f"({g})" for g in guards) or "True"
        self.hold = compile(together, "<guards>", "eval")
        self.out_spec = out_spec
        self.device = inputs[0][1].device
        self.calls = 0
        self.prepare: Callable[[Mapping[sympy.Expr, int]], None] | None = None
        self.graphed: nn.Module | None = None

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """Run on the call's arguments.

        Raises:
            DoesNotFit: a size, dtype or device is not what was captured; nothing was run.
        """
        tensors, sizes = self.fit(values)
        if self.prepare is not None:
            self.prepare(sizes)
        self.calls += 1
        if self.calls == 2:  # forward and backward are compiled now
            give_back(self.device, self.stored)
        # The graph's dtypes are decided; an autocast around the call must not change them while it compiles.
        with torch.autocast(self.device.type, enabled=False):
            outputs = (self.graphed or self.run)(*self.stored, *tensors)
        return pytree.tree_unflatten(list(outputs), self.out_spec)

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read these from now on, those among them that the graph reads: the tensors of another adapter."""
        pairs = zip(self.keys, self.stored, strict=True)
        self.stored = [tensors.get(key, old) for key, old in pairs]

    def fit(self, values: Mapping[str, Any]) -> tuple[list[torch.Tensor], dict[sympy.Expr, int]]:
        """The call's tensors in the graph's order, and its free sizes."""
        sizes: dict[sympy.Expr, int] = {}
        first: dict[sympy.Expr, str] = {}
        tensors = []
        for name, shape in self.shapes:
            tensor = values[name]
            for dim, (size, want) in enumerate(zip(tensor.shape, shape, strict=True)):
                if isinstance(want, Multiple):
                    size, rest = divmod(size, want.times)
                    if rest:
                        raise DoesNotFit(
                            f"{name}.shape[{dim}] is no multiple of {want.times}", name
                        )
                    want = want.symbol
                known = want if isinstance(want, int) else sizes.get(want)
                if known is None:
                    sizes[want], first[want] = size, f"{name}.shape[{dim}]"
                elif known != size:
                    there = (
                        f", but {first[want]} is {known}"
                        if want in first
                        else f", captured as {want}"
                    )
                    raise DoesNotFit(f"{name}.shape[{dim}] is {size}{there}", name)
            tensors.append(tensor.contiguous())
        if not holds(self.hold, values):
            failed = next(guard for guard in self.guards if not holds(guard, values))
            raise DoesNotFit(f"the capture relied on {failed}")
        return tensors, sizes


class Multiple(NamedTuple):
    """A size that is so many times a free one."""

    times: int
    symbol: sympy.Symbol


def size_of(size: int | torch.SymInt) -> int | sympy.Expr | Multiple:
    """A fixed size, or the formula of a free one."""
    if not isinstance(size, torch.SymInt):
        return size
    formula = size.node.expr
    if formula.is_number:
        return int(formula)
    times, symbol = multiple(formula)
    return formula if symbol is None or times == 1 else Multiple(times, symbol)


def multiple(formula: sympy.Expr) -> tuple[int, sympy.Symbol | None]:
    """A symbol and how many times it is taken; None where the formula is anything else."""
    times, symbol = formula.as_coeff_Mul()
    return (int(times), symbol) if symbol.is_symbol and times.is_Integer else (1, None)
