"""The free sizes of a body: which there are, and where a call shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from ...runtime.program import multiple
from ..graph.nodes import aten, is_number


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
# ranges, in S^2 / S). So the body's free sizes are the smallest of such lengths behind which the symbols disappear: the
# height S // 4 and the width T // 4 of a picture's patches, or only their product, where that is all that it reads. A
# quotient of a quotient, S // 8, is worked out from S // 4.
#
# Many a block takes the picture itself, to read its height. What is worked out from such an input is told to it instead.


def free_sizes(inputs: Sequence[fx.Node], told: Iterable[fx.Node] = ()) -> list[FreeSize]:
    """The free sizes of a body, those first that its inputs show.

    Args:
        inputs: placeholders whose tensors are read.
        told: numbers that depend on other inputs (``numbers_told``).
    """
    places: dict[sympy.Expr, tuple[int, int]] = {}
    for place, formula in shown(inputs):
        places.setdefault(formula, place)
    vals = [node.meta["val"] for node in inputs]
    sizes = [size for val in vals for size in (*val.shape, *val.stride())]
    sizes += [node.meta["val"] for node in told]
    left = list(dict.fromkeys(formula_of(s) for s in sizes if isinstance(s, torch.SymInt)))
    found: list[FreeSize] = []
    for formula in sorted(left, key=sympy.count_ops):
        size = computed(formula, places.get(formula))
        if size is None or not size.term.free_symbols <= remaining(left):
            continue
        name = sympy.Dummy()
        without = [written(other, [size], [name]) for other in left]
        if not size.term.free_symbols & remaining(without):
            left = without
            found.append(size)
    known = {size.term: size for size in symbols(inputs)}
    for symbol in sorted(remaining(left), key=str):
        found.append(known.get(symbol, FreeSize(symbol, 0, None)))
    return sorted(found, key=lambda size: (size.place is None, size.place or ()))


def remaining(formulas: Iterable[sympy.Expr]) -> set[sympy.Symbol]:
    """The capture's symbols that are left in formulas."""
    found: set[sympy.Symbol] = set().union(*(formula.free_symbols for formula in formulas))
    return {symbol for symbol in found if not symbol.is_Dummy}


def computed(formula: sympy.Expr, place: tuple[int, int] | None) -> FreeSize | None:
    """A formula as a size of its own: something worked out from symbols, times a number, give or take one."""
    if formula.is_number or free_unbacked_symbols(formula):
        return None
    times, size = formula.as_content_primitive()
    offset, term = size.as_coeff_Add()
    if not offset.is_Integer or not (term.is_Function or term.is_Mul):
        return None
    return FreeSize(term, int(offset), place, int(times))


def written(
    formula: sympy.Expr, sizes: Sequence[FreeSize], names: Sequence[sympy.Expr]
) -> sympy.Expr:
    """A formula with names in it for sizes, also inside of products and of quotients of quotients.

    All at once: a name may be what another size is called in the formula, for each ShapeEnv begins to count anew.
    """
    found: dict[sympy.Expr, sympy.Expr] = {}
    for size, name in zip(sizes, names, strict=True):
        for_now = sympy.Dummy(integer=True)
        found[for_now] = name - size.offset
        formula = replaced(formula, size.term, for_now)
    return formula.xreplace(found)


def replaced(formula: sympy.Expr, term: sympy.Expr, by: sympy.Expr) -> sympy.Expr:
    if formula == term:
        return by
    if not formula.args or not term.free_symbols <= formula.free_symbols:
        return formula
    if isinstance(formula, FloorDiv) and isinstance(term, FloorDiv) and formula.base == term.base:
        quotient = formula.divisor / term.divisor
        if quotient.is_Integer:
            return FloorDiv(by, quotient)
    if formula.is_Mul and term.is_Mul and set(term.args) <= set(formula.args):
        rest = [factor for factor in formula.args if factor not in term.args]
        return by * sympy.Mul(*(replaced(factor, term, by) for factor in rest))
    return formula.func(*(replaced(part, term, by) for part in formula.args))


def sizes_only(inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Inputs of which nothing is read but sizes, which the program's inputs show: not those that the data decide."""
    return {
        n
        for n in inputs
        if n.users
        and all(u.target is aten.sym_size.int for u in n.users)
        and not any(free_unbacked_symbols(formula) for _, formula in shown([n]))
    }


def numbers_told(graph: fx.Graph) -> tuple[list[fx.Node], set[fx.Node]]:
    """Numbers that depend on inputs of which sizes only are read: those that are used, and all that lead to them."""
    depend = sizes_only(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if node.op == "call_function" and is_number(node) and depend & {*node.all_input_nodes}:
            depend.add(node)
    used = [n for n in graph.nodes if n in depend and any(u not in depend for u in n.users)]
    return used, depend


def number(graph: fx.Graph, formula: sympy.Expr, values: dict[sympy.Symbol, fx.Node]) -> Any:
    """The node that works a formula out; of one without symbols, its value."""
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = {symbol: fx.Proxy(node, tracer) for symbol, node in values.items()}
    value = sympy_interp(PythonReferenceAnalysis, proxies, formula)
    return value.node if isinstance(value, fx.Proxy) else value


def symbols(inputs: Sequence[fx.Node]) -> list[FreeSize]:
    """Each symbol that is a size, or of which a size is a multiple, where it is first."""
    found: dict[sympy.Expr, FreeSize] = {}
    for place, formula in shown(inputs):
        times, symbol = multiple(formula)
        if symbol is not None:
            found.setdefault(symbol, FreeSize(symbol, 0, place, times))
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
