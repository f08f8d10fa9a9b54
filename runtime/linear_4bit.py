"""Products with a weight in 4 bits as one operator: for the few rows that a token of a generation has.

It reads the storage itself, Note [Products of few rows]:

- on a GPU by ``bitsandbytes::gemm_4bit``, which decides by rows, shape and device whether it makes the weight dense;
- on a CPU by the kernel for few rows.

More rows on a CPU, rows of other lengths than these kernels take, and machines without a compiler get the dense weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import few_rows
from .ops import dequantized, gradients, scales

# Not a ``custom_op``, whose Python takes 70 us a call: more than a small product.
torch.library.define(
    "qlora_fx::linear_4bit",
    "(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor? nested_quant_map, "
    "Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling, int[] shape, int blocksize, str quant_type) -> Tensor",
)


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor | None,
    nested_quant_map: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    shape: list[int],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    """``linear(x, weight, bias) + scaling * linear(linear(x, lora_a), lora_b)``, the weight frozen in 4-bit storage.

    Args:
        x: ``[..., in]``; its dtype is the compute dtype.
        packed, absmax, nested_absmax, offset, nested_quant_map: storage; the last three are None without double
            quantization.
        bias: ``[out]``, in the dtype of ``x``.
        lora_a, lora_b: ``[r, in]`` and ``[out, r]`` float32; None without an adapter.
        shape: ``[out, in]``.

    Returns:
        ``[..., out]`` in the dtype of ``x``; summed in float32 by the kernel for few rows.
    """
    size = shape[1]
    storage = (packed, absmax, nested_absmax, offset, nested_quant_map)
    if x.is_cuda and x.numel() and size % blocksize == 0:
        y = by_bitsandbytes(x, bias, storage, shape, blocksize, quant_type)
        return adapted(y, x, lora_a, lora_b, scaling)
    if few_rows.are_few(x, size) and few_rows.takes_4bit(size, blocksize):
        kernels = few_rows.kernels()
        if kernels is not None:
            return by_kernel(
                kernels, x, storage, bias, lora_a, lora_b, scaling, shape, blocksize, quant_type
            )
    return by_dense(x, bias, lora_a, lora_b, storage, scaling, shape, blocksize, quant_type)


def by_kernel(
    kernels: Any,
    x: Tensor,
    storage: Sequence[Tensor | None],
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    *options: Any,
) -> Tensor:
    """The same from storage, all of it as the kernel reads it."""
    dtype = x.dtype if x.dtype in few_rows.DTYPES else torch.float32
    added = None if bias is None else bias.to(dtype).contiguous()
    parts = [None if t is None else t.contiguous() for t in storage]
    factors = few_rows.in_float32(lora_a, lora_b)
    y: Tensor = kernels.linear_4bit(x.to(dtype), *parts, added, *factors, *options)
    return y.to(x.dtype)


def by_dense(
    x: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    storage: Sequence[Tensor | None],
    scaling: float,
    shape: list[int],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    """The same with the weight made dense; PyTorch knows its derivatives."""
    packed, *scale = storage
    with torch.no_grad():
        weight = dequantized(packed, scales(*scale), blocksize, quant_type, shape, x.dtype)  # type: ignore[arg-type]
    return adapted(torch.nn.functional.linear(x, weight, bias), x, lora_a, lora_b, scaling)


def by_bitsandbytes(
    x: Tensor,
    bias: Tensor | None,
    storage: Sequence[Tensor | None],
    shape: list[int],
    blocksize: int,
    quant_type: str,
) -> Tensor:
    """``linear(x, weight, bias)`` by bitsandbytes' own product, for rows of whole blocks."""
    packed, absmax, nested_absmax, offset, nested_quant_map = storage
    # To bitsandbytes ``absmax`` are always those in float32, of blocks or of double quantization.
    scale = (
        (absmax,) if nested_absmax is None else (nested_absmax, absmax, nested_quant_map, offset)
    )
    y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x, packed, shape, scale[0], blocksize, quant_type, bias, *scale[1:]
    )
    return y


def adapted(
    y: Tensor, x: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float
) -> Tensor:
    """``y`` and what the adapter adds."""
    if lora_a is None or lora_b is None:
        return y
    low = torch.nn.functional.linear(x, lora_a.to(x.dtype))
    branch = torch.nn.functional.linear(low, lora_b.to(x.dtype))
    return torch.add(y, branch, alpha=scaling)


torch.library.impl("qlora_fx::linear_4bit", ["CPU", "CUDA"], linear_4bit)
torch.library.register_fake("qlora_fx::linear_4bit")(
    lambda x, *others: few_rows.empty(x, others[9][0])
)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    x, *storage, bias, lora_a, lora_b = inputs[:9]
    ctx.save_for_backward(x, bias, lora_a, lora_b, *storage)
    ctx.options = inputs[9:]


def _backward(ctx: Any, grad: Tensor) -> Any:
    *differentiated, packed, absmax, nested, offset, levels = ctx.saved_tensors
    storage = (packed, absmax, nested, offset, levels)

    def dense(*tensors: Any) -> Tensor:
        x, bias, lora_a, lora_b = tensors
        return by_dense(x, bias, lora_a, lora_b, storage, *ctx.options)

    needed = [ctx.needs_input_grad[i] for i in (0, 6, 7, 8)]
    x, bias, lora_a, lora_b = gradients(dense, differentiated, needed, grad)
    return x, *(None for _ in storage), bias, lora_a, lora_b, *(None for _ in ctx.options)


torch.library.register_autograd("qlora_fx::linear_4bit", _backward, setup_context=_context)
