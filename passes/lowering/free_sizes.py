"""The free sizes of a body: which there are, and where a call shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ...runtime.program import multiple


class FreeSize(NamedTuple):
    """A size that is free where a body is compiled.

    Attributes:
        term: what stands for it in the capture's formulas: a symbol, or what the capture computed from symbols that
            the body has no other use for. Note [Sizes of a body's own].
        offset: the size is ``term + offset``.
        place: the input and the dimension that show it; None where the caller passes it.
        times: they show so many times the size: ``4 * S`` patches of a picture, of which 4 become one token.
    """

    term: sympy.Expr
    offset: int
    place: tuple[int, int] | None
    times: int = 1

    @property
    def formula(self) -> sympy.Expr:
        return self.term + self.offset


# Note [Sizes of a body's own]
# Behind convolutions, rows are (S // 5 - 5) // 4 + 1 long. A body that knows its rows by that formula only hands it to
# the compiler in each of its shapes, which takes many times as long to reason about, or fails (torch 2.13: Invalid
# ranges, in S^2 / S). Where all that a body reads is said in terms of such lengths, they are its free sizes.


def free_sizes(inputs: Sequence[fx.Node]) -> list[FreeSize]:
    """The free sizes that the inputs of a body show."""
    plain = symbols(inputs)
    own = [*plain, *computed_sizes(inputs)]
    needed = hidden(inputs, plain) and not hidden(inputs, own)
    return own if needed else plain


def hidden_symbols(inputs: Sequence[fx.Node]) -> set[sympy.Symbol]:
    """Symbols in the inputs' shapes or strides of which ``free_sizes`` knows nothing: the caller must pass them."""
    return hidden(inputs, free_sizes(inputs))


def symbols(inputs: Sequence[fx.Node]) -> list[FreeSize]:
    """Each symbol that is a size, or of which a size is a multiple, where it is first."""
    found: dict[sympy.Expr, FreeSize] = {}
    for place, formula in shown(inputs):
        times, symbol = multiple(formula)
        if symbol is not None:
            found.setdefault(symbol, FreeSize(symbol, 0, place, times))
    return list(found.values())


def computed_sizes(inputs: Sequence[fx.Node]) -> list[FreeSize]:
    """The same of sizes that are a function of symbols, give or take a number: ``S // 2 + 1``."""
    found: dict[sympy.Expr, FreeSize] = {}
    for place, formula in shown(inputs):
        offset, term = formula.as_coeff_Add()
        if isinstance(term, sympy.Function) and offset.is_Integer:
            found.setdefault(term, FreeSize(term, int(offset), place))
    return list(found.values())


def formula_of(size: torch.SymInt) -> sympy.Expr:
    """A size's formula; of one that the data decide, the formula of sizes that the capture found it to be equal to."""
    formula: sympy.Expr = size.node.expr
    env = size.node.shape_env
    for symbol in free_unbacked_symbols(formula):
        for found in env.deferred_runtime_asserts.get(symbol, ()):
            if isinstance(found.expr, sympy.Eq) and formula in found.expr.args:
                left, right = found.expr.args
                other: sympy.Expr = right if left == formula else left
                if not free_unbacked_symbols(other):
                    return other
    return formula


def shown(inputs: Sequence[fx.Node]) -> Iterator[tuple[tuple[int, int], sympy.Expr]]:
    for i, node in enumerate(inputs):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                yield (i, dim), formula_of(size)


def hidden(inputs: Sequence[fx.Node], known: Sequence[FreeSize]) -> set[sympy.Symbol]:
    """Symbols that remain in shapes and strides when the known sizes are named."""
    names = {size.term: sympy.Dummy() for size in known}
    left: set[sympy.Symbol] = set()
    for node in inputs:
        val = node.meta["val"]
        for size in (*val.shape, *val.stride()):
            if isinstance(size, torch.SymInt):
                left |= formula_of(size).xreplace(names).free_symbols
    return left - set(names.values())
