"""Attention over causal and other masks, as operators that torch.compile takes whole.

What computes them is chosen in each call from ``attention_kernels.KERNELS``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .attention_kernels import Inputs, Mask, kernel_for, mask_kind_of
from .attention_kernels.kernel import empty_gradients, empty_output
from .attention_kernels.varlen import sequences_of
from .ops import ops


@torch.library.custom_op("qlora_fx::mask_kind", mutates_args=())
def mask_kind(mask: Tensor) -> Tensor:
    """What a boolean mask ``[batch or 1, 1, queries, keys]`` is; looked up once per call of the model.

    Returns:
        An int64 scalar on the CPU: a code of a kernel's (``CAUSAL``, a ``Varlen``'s), or ``ANY``.
    """
    return torch.tensor(mask_kind_of(mask))


@mask_kind.register_fake
def _(mask: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("qlora_fx::mask_sequences", mutates_args=())
def mask_sequences(mask: Tensor) -> tuple[Tensor, Tensor]:
    """``mask_kind`` where a kernel on the device takes sequences, and where these start (attention_kernels/varlen.py).

    Returns:
        The kind of ``mask``, and int32 ``[4, 3, batch, sequence]`` on its device, of use where the kind says so.
    """
    code, starts = sequences_of(mask)
    return torch.tensor(code), starts


@mask_sequences.register_fake
def _(mask: Tensor) -> tuple[Tensor, Tensor]:
    starts = mask.new_empty((4, 3, mask.shape[0], mask.shape[2]), dtype=torch.int32)
    return torch.empty((), dtype=torch.int64), starts


@torch.library.custom_op("qlora_fx::attention", mutates_args=())
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    kind: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + mask) v``.

    Args:
        q: ``[batch, heads, sequence, size]``.
        k: ``[batch, key heads, sequence, size]``; ``heads`` is a multiple of ``key heads``.
        v: ``[batch, key heads, sequence, value size]``.
        mask: boolean, True where a key is seen, ``[batch or 1, heads or 1, sequence, sequence]``; None: causal.
        kind: what ``mask_kind(mask)`` said.
        scale: of the scores.
        cu_seqlens: where the mask's sequences start, from ``mask_sequences``.

    Returns:
        ``[batch, heads, sequence, value size]`` with the strides of a transposed ``[batch, sequence, heads, ...]``;
        a query that sees no key gets zeros. And for backward the float32 log-sum-exp of the scores,
        ``[batch, heads, sequence]``.
    """
    inputs = Inputs(q, k, v, Mask.of(mask, kind, cu_seqlens), scale)
    return kernel_for(inputs).forward(inputs)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_output(q, v)


@torch.library.custom_op("qlora_fx::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    kind: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention`` for ``q``, ``k`` and ``v``, contiguous and in their dtypes."""
    inputs = Inputs(q, k, v, Mask.of(mask, kind, cu_seqlens), scale)
    return kernel_for(inputs).backward(inputs, out, lse, grad)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, kind, scale, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, mask, kind, cu_seqlens)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    *saved, cu_seqlens = ctx.saved_tensors
    told = () if cu_seqlens is None else (cu_seqlens,)
    dq, dk, dv = ops.attention_backward(grad, *saved, ctx.scale, *told)
    return dq, dk, dv, None, None, None, None


torch.library.register_autograd("qlora_fx::attention", _backward, setup_context=_context)
