"""Places in memory as polynomials, which need no search for a simpler form.

Inductor asks sympy's ``simplify`` how an index moves with a loop. It tries dozens of ways, 40 ms of them for a sum like
``32*b*S + 16*s + d``, where free sizes appear: a quarter of the time of compiling a Llama block for a CPU. Where rows are a
picture's patches, ``(H // 4) * (W // 4)`` long, it is up to 4 s for one sum.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import sympy
from torch.utils._sympy import functions


@contextlib.contextmanager
def polynomials_expanded() -> Iterator[None]:
    """While it holds ``sympy.simplify`` multiplies polynomials out, and does what it did with all else."""
    simplify = sympy.simplify

    def quick(expr: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(expr, sympy.Expr):
            return simplify(expr, *args, **kwargs)
        try:
            return expanded(expr)
        except NoPolynomialError:
            return simplify(expr)

    with mock.patch.object(sympy, "simplify", quick):
        yield


class NoPolynomialError(Exception):
    """A quotient, a condition, a fraction."""


def expanded(expr: sympy.Expr) -> sympy.Expr:
    """Sums of products of symbols and of what rounds them (``H // 4``), with whole numbers, multiplied out, inside too.

    Raises:
        NoPolynomialError: there is something else in it.
    """
    names: dict[sympy.Expr, sympy.Dummy] = {}

    def named(node: Any) -> Any:
        """The polynomial with a name for each function, since ``expand`` would look into those."""
        if node.is_Symbol or node.is_Integer:
            return node
        if node.is_Add or node.is_Mul or is_power(node):
            return node.func(*map(named, node.args))
        if not is_whole(node):
            raise NoPolynomialError
        args = tuple(map(expanded, node.args))
        function = node if args == node.args else node.func(*args)
        if not is_whole(function):
            return named(function)  # S * 8 // 8
        return names.setdefault(function, sympy.Dummy())

    polynomial = sympy.expand(named(expr))
    return polynomial.xreplace({name: function for function, name in names.items()})


def is_power(node: Any) -> bool:
    return bool(node.is_Pow and node.exp.is_Integer and node.exp.is_positive)


def is_whole(node: Any) -> bool:
    """Whether it is one of PyTorch's functions from whole numbers to whole numbers."""
    return type(node).__module__ == functions.__name__
