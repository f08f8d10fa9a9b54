"""Products with a stack of expert weights, as operators that torch.compile takes whole.

How many rows each expert gets is known only when the router has run, so the compiler could not tile these
products anyway. Rows come sorted by expert; ``ends[i]`` is where the rows of expert ``i`` end. An expert
without rows costs nothing and gets a zero gradient; rows behind ``ends[-1]`` give zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .gpu import BFLOAT16, capability

ops: Any = torch.ops.qlora_fx
_bnb = torch.ops.bitsandbytes

NESTED_BLOCKSIZE = 256

ELEMENTS = (1 << 31) - 1
"""Largest number of values in one call of bitsandbytes' kernels, which count in 32 bits."""

ANY_STRIDES = (torch.Tag.flexible_layout,)
"""Of operators whose kernels take any strides. Otherwise Inductor gives them those of the trace, written as numbers
where it knows them for one size only."""


# Note [Rows that do not fill blocks]
# The 4-bit dequantization of bitsandbytes 0.50.2 for CPUs with AVX-512 starts a new block at each row of the
# shape it is given, but blocks run through rows: where a row is no multiple of the block (in_features 48, or
# 96, with blocks of 64) most values get another block's absmax, an error of 28 to 96 % where 4 bits cost 9 %.
# The values do not depend on where rows end, so it is asked for rows of whole blocks, and the result viewed.


def whole_rows(shape: Sequence[int], blocksize: int) -> list[int]:
    """A shape for the ``math.prod(shape)`` values whose rows are whole blocks. Note [Rows that do not fill blocks].

    One row where the values themselves fill no whole number of blocks.
    """
    n = math.prod(shape)
    if shape[-1] % blocksize == 0:
        return list(shape)
    return [n // blocksize, blocksize] if n % blocksize == 0 else [1, n]


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Any], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Of a function's inputs those that are needed, by PyTorch's derivatives of what it calls; it is computed again."""
    with torch.enable_grad():
        again = [
            t.detach().requires_grad_() if need else t
            for t, need in zip(inputs, needed, strict=True)
        ]
        wanted = [t for t, need in zip(again, needed, strict=True) if need]
        found = iter(torch.autograd.grad(function(*again), wanted, grad))
    return [next(found) if need else None for need in needed]


def scales(
    absmax: Tensor,
    nested_absmax: Tensor | None = None,
    offset: Tensor | None = None,
    nested_quant_map: Tensor | None = None,
) -> Tensor:
    """The float32 absmax of a matrix in 4 bits, or of each of a stack, from 8 bits where it is quantized itself."""
    if nested_absmax is None or offset is None or nested_quant_map is None:
        return absmax
    if absmax.dim() == 2:  # a stack, whose matrices begin blocks of their own
        return scales_by_formula(absmax, nested_absmax, offset, nested_quant_map)
    nested: Tensor = _bnb.dequantize_blockwise(
        absmax, nested_absmax, nested_quant_map, NESTED_BLOCKSIZE, torch.float32
    )
    return nested + offset


def scales_by_formula(
    absmax: Tensor, nested_absmax: Tensor, offset: Tensor, nested_quant_map: Tensor
) -> Tensor:
    """``scales`` of 8 bits in PyTorch's operators; a byte is always inside the map."""
    spread = nested_absmax.repeat_interleave(NESTED_BLOCKSIZE, -1)[..., : absmax.shape[-1]]
    levels: Tensor = torch.ops.aten._unsafe_index(nested_quant_map, [absmax.int()])
    return levels * spread + offset[..., None]


def dequantized(
    packed: Tensor,
    scale: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The matrix ``shape`` in ``dtype``, of codes and their ``scales``. Note [Rows that do not fill blocks]."""
    rows = whole_rows(shape, blocksize)
    dense: Tensor = _bnb.dequantize_4bit(packed, scale, blocksize, quant_type, rows, dtype)
    return dense.view(list(shape))


def _groups(ends: Tensor) -> Iterator[tuple[int, int, int]]:
    """``(expert, start, stop)`` of each expert that has rows. Waits for the device once."""
    start = 0
    for expert, stop in enumerate(ends.tolist()):
        if stop > start:
            yield expert, start, stop
            start = stop


# Note [Groups on a GPU]
# To slice rows by group, the host must know where groups end, and waits for the device: once per product, and a launch
# per group. ``aten::_grouped_mm`` (PyTorch, since 2.9) reads the ends on the device. It takes bfloat16 whose rows are
# 16 bytes or a multiple; everything else goes group by group.


def form_groups(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether a GPU that multiplies bfloat16 computes grouped products of such rows and matrices in one launch."""
    return dtype == torch.bfloat16 and not any(size % 8 for size in sizes)


def takes_groups(x: Tensor, *sizes: int) -> bool:
    """Whether one launch computes grouped products of rows like these with matrices of these sizes.

    Note [Groups on a GPU].
    """
    return x.is_cuda and form_groups(x.dtype, *sizes) and capability(x.device) >= BFLOAT16


def zero_behind(y: Tensor, ends: Tensor) -> Tensor:
    """``y`` with zeros in the rows of no group, which the kernel leaves as they were."""
    rows = torch.arange(y.shape[0], device=y.device)
    return y.masked_fill_((rows >= ends[-1])[:, None], 0)


@torch.library.custom_op("qlora_fx::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``x[s:e] @ weight[i].T`` for each group of rows.

    Args:
        x: ``[rows, in]``, sorted by group.
        weight: ``[groups, out, in]``, any strides.
        ends: ``[groups]`` integers, where each group's rows end.

    Returns:
        ``[rows, out]`` in the dtype of ``x``.
    """
    return grouped_product(x, weight.transpose(1, 2), ends)


def grouped_product(x: Tensor, factors: Tensor, ends: Tensor) -> Tensor:
    """``x[s:e] @ factors[i]`` for each group of rows; ``factors`` ``[groups, in, out]``."""
    if takes_groups(x, *factors.shape[1:]):
        y: Tensor = torch._grouped_mm(x.contiguous(), whole_strides(factors), offs=ends.int())
        return zero_behind(y, ends)
    y = x.new_zeros(x.shape[0], factors.shape[2])
    for i, start, stop in _groups(ends):
        torch.mm(x[start:stop], factors[i], out=y[start:stop])
    return y


def whole_strides(t: Tensor) -> Tensor:
    """Matrices whose rows or columns are contiguous and aligned, as the grouped kernel wants them."""
    step = {t.stride(-1), t.stride(-2)} - {1}
    fine = 1 in t.stride()[-2:] and not any(s % 8 for s in step) and t.stride(0) % 8 == 0
    return t if fine else t.contiguous()


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    torch._check(x.shape[1] == weight.shape[2])  # type: ignore[no-untyped-call]
    torch._check(ends.shape[0] == weight.shape[0])  # type: ignore[no-untyped-call]
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("qlora_fx::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """``grad[s:e].T @ x[s:e]`` for each group of rows: the weight gradient of ``grouped_linear``.

    Returns:
        ``[groups, out, in]``; zero where a group has no rows.
    """
    if takes_groups(x, grad.shape[1], x.shape[1]):
        summed: Tensor = torch._grouped_mm(grad.t(), x.contiguous(), offs=ends.int())
        return summed
    out = grad.new_zeros(ends.shape[0], grad.shape[1], x.shape[1])
    for i, start, stop in _groups(ends):
        torch.mm(grad[start:stop].t(), x[start:stop], out=out[i])
    return out


@grouped_outer.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return grad.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _grouped_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad: Tensor) -> Any:
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    dx = ops.grouped_linear(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
    dw = ops.grouped_outer(grad, x, ends) if ctx.needs_input_grad[1] else None
    return dx, dw, None


torch.library.register_autograd(
    "qlora_fx::grouped_linear", _grouped_backward, setup_context=_grouped_context
)


@torch.library.custom_op("qlora_fx::grouped_linear_4bit", mutates_args=())
def grouped_linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_quant_map: Tensor | None,
    ends: Tensor,
    shape: list[int],
    blocksize: int,
    quant_type: str,
    transpose: bool = False,
) -> Tensor:
    """``grouped_linear`` with a frozen weight in 4-bit storage, one expert dense at a time.

    Backward dequantizes again and gives ``x`` its gradient; nothing dense is kept in between.

    Args:
        x: ``[rows, in]`` (``[rows, out]`` if ``transpose``), sorted by expert; its dtype is the compute dtype.
        packed, absmax, nested_absmax, offset, nested_quant_map: storage, each with a leading dimension of
            experts but the shared map; the last three are None without double quantization.
        ends: ``[experts]`` integers, where each expert's rows end.
        shape: ``[out, in]`` of one expert.
        transpose: multiply by ``weight[i]`` instead of ``weight[i].T``.

    Returns:
        ``[rows, out]`` (``[rows, in]`` if ``transpose``).
    """
    if takes_groups(x, *shape):
        stack = dense_stack(
            packed, absmax, nested_absmax, offset, nested_quant_map, shape, blocksize, quant_type
        )
        return grouped_product(x, stack if transpose else stack.transpose(1, 2), ends)
    y = x.new_zeros(x.shape[0], shape[1] if transpose else shape[0])
    for i, start, stop in _groups(ends):
        scale = absmax[i]
        if nested_absmax is not None and offset is not None:
            scale = scales(scale, nested_absmax[i], offset[i], nested_quant_map)
        weight = dequantized(packed[i], scale, blocksize, quant_type, shape, x.dtype)
        torch.mm(x[start:stop], weight if transpose else weight.t(), out=y[start:stop])
    return y


def dense_stack(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_quant_map: Tensor | None,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    """A stack of experts in bfloat16, ``[experts, out, in]``, in as few launches as there can be."""
    absmax = scales(absmax, nested_absmax, offset, nested_quant_map)
    experts, size = packed.shape[0], math.prod(shape)
    step = max(1, ELEMENTS // size) if size % blocksize == 0 else 1
    stacks = []
    for first in range(0, experts, step):
        codes, scale = packed[first : first + step], absmax[first : first + step]
        stacks.append(
            dequantized(
                codes.reshape(-1, 1),
                scale.flatten(),
                blocksize,
                quant_type,
                (len(codes), *shape),
                torch.bfloat16,
            )
        )
    return stacks[0] if len(stacks) == 1 else torch.cat(stacks)


@grouped_linear_4bit.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_quant_map: Tensor | None,
    ends: Tensor,
    shape: list[int],
    blocksize: int,
    quant_type: str,
    transpose: bool = False,
) -> Tensor:
    torch._check(x.shape[1] == shape[0 if transpose else 1])  # type: ignore[no-untyped-call]
    return x.new_empty(x.shape[0], shape[1] if transpose else shape[0])


def _grouped_4bit_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:7])
    ctx.options = inputs[7:]


def _grouped_4bit_backward(ctx: Any, grad: Tensor) -> Any:
    shape, blocksize, quant_type, transpose = ctx.options
    dx = ops.grouped_linear_4bit(
        grad.contiguous(), *ctx.saved_tensors, shape, blocksize, quant_type, not transpose
    )
    return dx, *(None for _ in range(10))


torch.library.register_autograd(
    "qlora_fx::grouped_linear_4bit", _grouped_4bit_backward, setup_context=_grouped_4bit_context
)
