"""Places in memory as polynomials, which need no search for a simpler form.

Inductor asks sympy's ``simplify`` how an index moves with a loop. It tries dozens of ways, 40 ms of them for a sum like
``32*b*S + 16*s + d``, where free sizes appear: a quarter of the time of compiling a Llama block for a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import sympy


@contextlib.contextmanager
def polynomials_expanded() -> Iterator[None]:
    """While it holds ``sympy.simplify`` multiplies polynomials out, and does what it did with all else."""
    simplify = sympy.simplify

    def quick(expr: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not is_polynomial(expr):
            return simplify(expr, *args, **kwargs)
        return sympy.expand(expr)

    with mock.patch.object(sympy, "simplify", quick):
        yield


def is_polynomial(expr: Any) -> bool:
    """True for sums of products of symbols, with whole numbers."""
    return isinstance(expr, sympy.Expr) and all(
        node.is_Add
        or node.is_Mul
        or node.is_Symbol
        or node.is_Integer
        or (node.is_Pow and node.exp.is_Integer and node.exp.is_positive)
        for node in sympy.preorder_traversal(expr)
    )
