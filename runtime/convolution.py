"""A convolution with frozen weights, as an operator that torch.compile takes whole.

Inductor's own code for the backward of a convolution fixes the sizes that it is shown: each sequence length would be
compiled anew. The kernels are PyTorch's either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import ANY_STRIDES, ops

aten = torch.ops.aten


@torch.library.custom_op("qlora_fx::convolution", mutates_args=(), tags=ANY_STRIDES)
def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> Tensor:
    """``aten::convolution`` over the last dimensions of ``x``, differentiable by ``x`` alone.

    Args:
        x: ``[batch, channels, *sizes]``.
        weight: ``[out, channels / groups, *window]`` in the dtype of ``x``.
        bias: ``[out]``.
        stride, padding, dilation: one number per size.
        groups: of channels.
        channels_last: how the result lies in memory; for two or three sizes.

    Returns:
        ``[batch, out, *sizes]``, contiguous or channels last, in the dtype of ``x``.
    """
    result = aten.convolution(
        x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups
    )
    return result.contiguous(memory_format=layout(x, channels_last))  # type: ignore[no-any-return]


def layout(x: Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if x.dim() == 4 else torch.channels_last_3d


@convolution.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool = False,
) -> Tensor:
    windows = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    sizes = [(size + 2 * p - d * (w - 1) - 1) // s + 1 for size, w, s, p, d in windows]
    shape = (x.shape[0], weight.shape[0], *sizes)
    form = layout(x, channels_last)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=form)


@torch.library.custom_op("qlora_fx::convolution_backward", mutates_args=(), tags=ANY_STRIDES)
def convolution_backward(
    grad: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of ``convolution`` for its input, which had ``shape``; contiguous."""
    x = grad.new_empty(1).expand(list(shape))  # only its shape is looked at
    options = (stride, padding, dilation, False, [0] * len(stride), groups)
    return aten.convolution_backward(  # type: ignore[no-any-return]
        grad, x, weight, None, *options, [True, False, False]
    )[0].contiguous()


@convolution_backward.register_fake
def _(grad: Tensor, weight: Tensor, shape: Sequence[int], *_: Any) -> Tensor:
    return grad.new_empty(list(shape))


def _context(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, _, *options, _ = inputs
    ctx.save_for_backward(weight)
    ctx.shape, ctx.options = x.shape, options


def _backward(ctx: Any, grad: Tensor) -> Any:
    dx = ops.convolution_backward(grad, *ctx.saved_tensors, list(ctx.shape), *ctx.options)
    return dx, *(None for _ in range(7))


torch.library.register_autograd("qlora_fx::convolution", _backward, setup_context=_context)
