"""Products with a dense weight as one operator: for the few rows that a token of a generation has.

Note [Products of few rows].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import few_rows
from .linear_4bit import adapted
from .ops import gradients

# Not a ``custom_op``, as linear_4bit.
torch.library.define(
    "qlora_fx::linear_dense",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling) -> Tensor",
)


def linear_dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    """``linear(x, weight, bias) + scaling * linear(linear(x, lora_a), lora_b)``.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]`` in the dtype of ``x``.
        bias: ``[out]`` in the dtype of ``x``.
        lora_a, lora_b: ``[r, in]`` and ``[out, r]`` float32; None without an adapter.

    Returns:
        ``[..., out]`` in the dtype of ``x``; summed in float32 by the kernel for few rows.
    """
    size = weight.shape[1]
    if few_rows.are_few(x, size) and few_rows.takes_dense(size, x.dtype):
        kernels = few_rows.kernels()
        if kernels is not None:
            read = few_rows.in_float32(weight, bias, lora_a, lora_b)
            y: Tensor = kernels.linear_dense(x, *read, scaling)
            return y
    return by_pytorch(x, weight, bias, lora_a, lora_b, scaling)


def by_pytorch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
) -> Tensor:
    """The same by PyTorch's products, whose derivatives it knows.

    Of a matrix: rows of other strides (the last token of each) would each be multiplied by a copy of the weight.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = torch.nn.functional.linear(rows, weight, bias)
    return adapted(y, rows, lora_a, lora_b, scaling).view(*x.shape[:-1], weight.shape[0])


torch.library.impl("qlora_fx::linear_dense", ["CPU", "CUDA"], linear_dense)
torch.library.register_fake("qlora_fx::linear_dense")(
    lambda x, weight, *_: few_rows.empty(x, weight.shape[0])
)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> Any:
    def again(x: Tensor, weight: Tensor, bias: Any, lora_a: Any, lora_b: Any) -> Tensor:
        return by_pytorch(x, weight, bias, lora_a, lora_b, ctx.scaling)

    return *gradients(again, ctx.saved_tensors, ctx.needs_input_grad[:-1], grad), None


torch.library.register_autograd("qlora_fx::linear_dense", _backward, setup_context=_context)
