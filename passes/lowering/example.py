"""Arguments for one compilation of a body, and what the compiler relied on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, free_unbacked_symbols

from .free_sizes import FreeSize, formula_of, written
from .partition import Partition

# Note [Guards of the compiler]
# AOTAutograd and Inductor may decide something by the sizes that they are shown (a convolution's backward in
# Inductor fixes the length of a row), and note a guard with their ShapeEnv. Dynamo would check it; here nobody does.
# So each compilation gets a ShapeEnv of its own, whose symbols have the sizes of the call at hand as hints; the
# guards that were added are kept and checked before each call, and a call that they refuse is compiled anew.
# A shared ShapeEnv would also let one body's decision fix the sizes of all others.

USUAL_ROWS = (5, 1)
"""A size that the data decide, where no call is at hand: the first that the capture's claims allow."""


def allowed(captured: ShapeEnv, symbol: sympy.Symbol) -> int:
    """A size that the data decide, of ``USUAL_ROWS``: it may have to divide another (tokens of a picture)."""
    claims = [found.expr for found in captured.deferred_runtime_asserts.get(symbol, ())]
    for size in USUAL_ROWS:
        values = {**captured.backed_var_to_val, symbol: sympy.Integer(size)}
        if all(claim.xreplace(values) != sympy.false for claim in claims):
            return size
    return USUAL_ROWS[0]


class FreeStrides(ShapeEnv):
    """Keeps the strides that Inductor gives to what a forward saves as formulas.

    AOTAutograd shows them to the backward as numbers, which are right for one size and guarded by nothing.
    """

    def evaluate_symexpr(self, code: str) -> Any:
        return self.deserialize_symexpr(code)


class Example:
    """Arguments for one compilation: fake tensors whose sizes are symbols of a ShapeEnv of their own.

    Args:
        gm: the graph; takes the tensors and then one integer per symbol.
        vals: the capture's fake value of each tensor.
        needs_grad: by tensor; empty: none does.
        free: the free sizes, in the order in which they are passed.
        sizes: what they are in the call at hand; empty: as in the capture.
        partition: of the graph; its formulas get the capture's symbols back.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        vals: Sequence[Any],
        needs_grad: Sequence[bool],
        free: Sequence[FreeSize],
        sizes: Sequence[int],
        partition: Partition,
    ) -> None:
        self.gm, self.partition = gm, partition
        self.env = FreeStrides()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.mode.cache_enabled = False  # of symbolic sizes, it takes longer than what it saves
        captured: ShapeEnv = vals[0].fake_mode.shape_env
        self.free: list[torch.SymInt] = []
        names: list[sympy.Expr] = []
        hints: dict[sympy.Expr, sympy.Integer] = {}
        formulas: dict[sympy.Symbol, sympy.Expr] = {}
        for i, (term, offset, _, _) in enumerate(free):
            by_data = free_unbacked_symbols(term)
            hint = (
                sizes[i]
                if sizes
                else allowed(captured, term)
                if by_data
                else hint_of(captured, term) + offset
            )
            hint = hint if by_data else known(hint)
            source = ConstantSource(f"size_{i}")
            expr = self.env.create_symbol(
                hint, source, DimDynamic.DYNAMIC, do_not_specialize_zero_one=bool(by_data)
            )
            self.free.append(
                cast(torch.SymInt, self.env.create_symintnode(expr, hint=hint, source=source))
            )
            names.append(expr)
            if isinstance(expr, sympy.Symbol):
                formulas[expr], hints[expr] = term + offset, sympy.Integer(hint)

        computed = any(not size.term.is_symbol for size in free)

        def size(old: Any) -> Any:
            if not isinstance(old, torch.SymInt):
                return old
            expr = written(formula_of(old), free, names)
            if computed:  # (S // 2 + 1) * 8 is written as (S // 2) * 8 + 8
                expr = sympy.expand(expr)
            return self.env.create_symintnode(expr, hint=int(expr.xreplace(hints)))

        self.args: list[Any] = []
        with self.mode:
            for i, val in enumerate(vals):
                shape, strides = map(size, val.shape), map(size, val.stride())
                tensor = torch.empty_strided(
                    tuple(shape), tuple(strides), dtype=val.dtype, device=val.device
                )
                self.args.append(tensor.requires_grad_(bool(needs_grad) and needs_grad[i]))
        self.args += self.free
        partition.symbols = formulas

    def guards(self) -> Callable[[tuple[int, ...]], bool] | None:
        """What the compiler relied on, as a test of sizes; None where it relied on nothing."""
        fixed = any(not size.node.expr.is_symbol for size in self.free)
        if not self.env.guards and not fixed:
            return None
        # Also sizes that became plain numbers are compared: ignore_static would leave them out.
        text = self.env.produce_guards_expression(self.free, ignore_static=False)
        if text is None:
            return None
        env = self.env

        @functools.lru_cache(maxsize=1024)
        def holds(sizes: tuple[int, ...]) -> bool:
            found: bool = env.evaluate_guards_expression(text, [known(s) for s in sizes])
            return found

        return holds


def known(size: int) -> int:
    """A size that a capture knows: 2 and more; what holds for them holds for 1.

    1 counts as 3: a program for 2 alone (where n - 1 is one, which is broadcast) is none for 1.
    """
    return size if size > 1 else 3


def hint_of(env: ShapeEnv, term: sympy.Expr) -> int:
    return int(term.xreplace(env.backed_var_to_val))
