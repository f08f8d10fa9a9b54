"""What torch.export does for others: it takes time, or tells sizes apart that are one to the model.

A graph that is captured here is written anew (flat_graph.py) and never saved as an ``ExportedProgram``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import sympy
import torch
from torch import _prims_common as prims
from torch._export.passes import replace_set_grad_with_hop_pass
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..passes.graph.values import IMPLICIT, linear_value, view_value

LONGEST = 30
"""Operations in the formula of a size: sizes of pictures take up to 17 in nearly all models, 47 in Hiera, 51 in Swin v2 and 264
in a Swin of two stages, where each stage's follow from those of the one before."""


class LongFormulaError(Exception):
    """A size that is worked out from free sizes takes more than ``LONGEST`` operations."""


@contextlib.contextmanager
def shortcuts(short: bool) -> Iterator[None]:
    """Trace without them.

    - ``torch.no_grad()`` stays in the graph as the two nodes that were traced. It would be cut into pieces there, for a
      higher-order operator that flat_graph.py had to inline again: a fifth of a capture's time.
    - No memory format is written down beside each value, which has its strides.
    - Whether a tensor of n - 1 tokens is dense, and can be written over another of as many, is answered for every n. To ask
      whether n is 2 (strides of one token say nothing, and one would be broadcast) made n no free size: a T5, whose decoder
      reads the labels without the last one, was captured again for labels of two tokens, and the first time twice.
    - For the same reason a tensor that is written to is not asked whether it overlaps itself: the model runs as it is.
    - What a linear gives is said, not computed: a tenth of the time. So are views of dense tensors (``view_value``): windows of
      a picture of any size (Swin) are quotients of its sides, and to compare those takes seconds.

    Args:
        short: formulas of sizes must be.

    Raises:
        LongFormulaError: one is not.
    """
    with (
        mock.patch.object(
            replace_set_grad_with_hop_pass, "replace_set_grad_with_hop_pass", lambda *graph: graph
        ),
        mock.patch.object(proxy_tensor, "_extract_tensor_metadata", no_metadata),
        mock.patch.object(prims, "check_contiguous_sizes_strides", dense_for_every_size),
        mock.patch.object(torch._refs, "expand", expanded),
        mock.patch.object(torch._refs, "_reshape_view_helper", short_view if short else view_value),
        linears_by_their_shapes(),
        mock.patch.object(torch, "_debug_has_internal_overlap", overlaps_nowhere),
    ):
        yield


def no_metadata(value: Any) -> None:
    return None


def overlaps_nowhere(tensor: torch.Tensor) -> int:
    return 0


@contextlib.contextmanager
def linears_by_their_shapes() -> Iterator[None]:
    linear = torch.ops.aten.linear.default
    try:
        with mock.patch.dict(linear.py_kernels, {IMPLICIT: linear_value}):
            linear._dispatch_cache.clear()
            yield
    finally:
        linear._dispatch_cache.clear()


def short_view(tensor: torch.Tensor, *shape: Any, allow_copy: bool) -> torch.Tensor:
    """``view_value``, which windows of pictures go through, one by one: long before their formulas take minutes."""
    for size in tensor.shape:
        if isinstance(size, torch.SymInt) and operations(size.node.expr) > LONGEST:
            raise LongFormulaError(f"a size is {size}")
    return view_value(tensor, *shape, allow_copy=allow_copy)


@functools.lru_cache(maxsize=4096)
def operations(formula: sympy.Expr) -> int:
    return int(formula.count_ops())


asked_for_these_sizes = prims.check_contiguous_sizes_strides
broadcast = torch._refs.expand


def dense_for_every_size(sizes: Any, strides: Any, false_if_dde: bool = False) -> bool:
    """Whether strides are those of a contiguous tensor. Where "no" may be said in doubt, no size is looked at."""
    if not false_if_dde:
        return bool(asked_for_these_sizes(sizes, strides))  # type: ignore[no-untyped-call]
    expected: Any = 1
    for size, stride in reversed(tuple(zip(sizes, strides, strict=True))):
        if statically_known_true(size == 1):
            continue
        if not statically_known_true(stride == expected):
            return False
        expected = expected * size
    return True


def expanded(tensor: torch.Tensor, *shape: Any) -> torch.Tensor:
    """``tensor`` itself, where it has this shape, whatever its sizes are."""
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], (int, torch.SymInt)) else shape
    same = len(sizes) == tensor.dim() and all(
        statically_known_true(a == b) for a, b in zip(tensor.shape, sizes, strict=True)
    )
    return tensor if same else broadcast(tensor, *shape)  # type: ignore[no-any-return, operator]
