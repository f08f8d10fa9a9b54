"""Products with a weight in 4 bits as one operator: for the few rows that a token of a generation has.

# Note [Products of few rows]
In training a weight is made dense and multiplied by hundreds of rows. A token that is generated has one row, and most of
its time went to writing dense weights and reading them again. ``linear_4bit`` reads the storage itself:

- on a GPU by ``bitsandbytes::gemm_4bit``, which decides by rows, shape and device whether it makes the weight dense;
- on a CPU by ``linear_4bit.cpp`` for up to ``FEW`` rows, compiled once per machine with Inductor's settings and kept in
  Inductor's cache.

More rows on a CPU, rows of other lengths than these kernels take, and machines without a compiler get the dense weight.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu_kernels
from .ops import dequantized, gradients, scales

FEW = 16
"""Rows up to which the storage is read instead of the dense weight."""
STEP = 32
"""Values that the kernel looks up at a time."""


class Arguments(ctypes.Structure):
    """Mirrors ``Arguments`` in linear_4bit.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "out", "in", "blocksize", "rank", "threads")),
        ("scaling", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("x", "codes", "absmax", "scales")),
        *((name, ctypes.c_void_p) for name in ("nested_absmax", "nested_levels", "offset")),
        *((name, ctypes.c_void_p) for name in ("levels", "bias", "lora_a", "lora_b", "y")),
    )


# Not a ``custom_op``, whose Python takes 70 us a call: a small product takes half of that.
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
    out, size = shape
    storage = (packed, absmax, nested_absmax, offset, nested_quant_map)
    if x.is_cuda and x.numel() and size % blocksize == 0:
        y = by_bitsandbytes(x, bias, storage, shape, blocksize, quant_type)
        return adapted(y, x, lora_a, lora_b, scaling)
    kernel = kernel_for(x, size, blocksize)
    if kernel is None:
        return by_dense(x, bias, lora_a, lora_b, storage, scaling, shape, blocksize, quant_type)
    wide = x.float().contiguous()
    y = wide.new_empty(*x.shape[:-1], out)
    double = nested_absmax is not None
    held = [
        wide,
        packed,
        None if double else absmax,
        absmax if double else None,
        nested_absmax,
        nested_quant_map,
        offset,
        levels(quant_type),
        None if bias is None else bias.float().contiguous(),
        None if lora_a is None else lora_a.float().contiguous(),
        None if lora_b is None else lora_b.float().contiguous(),
        y,
    ]
    rank = 0 if lora_a is None else lora_a.shape[0]
    sizes = (wide.numel() // size, out, size, blocksize, rank, torch.get_num_threads(), scaling)
    cpu_kernels.run(kernel, Arguments(*sizes, *(None if t is None else t.data_ptr() for t in held)))
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


def _fake(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], others[9][0])


torch.library.impl("qlora_fx::linear_4bit", ["CPU", "CUDA"], linear_4bit)
torch.library.register_fake("qlora_fx::linear_4bit")(_fake)


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


def kernel_for(x: Tensor, size: int, blocksize: int) -> Any:
    """The kernel for rows like these; None where the weight is made dense."""
    rows = x.numel() // size
    if x.device.type != "cpu" or not 0 < rows <= FEW or size % STEP or blocksize % STEP:
        return None
    functions = cpu_kernels.compiled("linear_4bit.cpp")
    return None if functions is None else functions.linear_4bit


@functools.cache
def levels(quant_type: str) -> Tensor:
    """The 16 values that codes stand for, as bitsandbytes dequantizes them."""
    codes = torch.arange(0, 16, 2, dtype=torch.uint8) * 16 + torch.arange(1, 16, 2)
    codes = torch.cat([codes, codes.new_zeros(24)]).to(torch.uint8)[:, None]
    dense = dequantized(codes, torch.ones(1), 64, quant_type, [1, 64], torch.float32)
    return dense[0, :16].clone()
