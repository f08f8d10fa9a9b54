"""Attention over causal and other masks, as operators that torch.compile takes whole.

What computes them is chosen in each call from ``attention_kernels.KERNELS``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .attention_kernels import Inputs, Mask, kernel_for, mask_kind_of
from .attention_kernels.kernel import empty_gradients, empty_output
from .ops import ANY_STRIDES, gradients, ops


@torch.library.custom_op("qlora_fx::mask_kind", mutates_args=())
def mask_kind(mask: Tensor) -> Tensor:
    """What a boolean mask ``[batch or 1, 1, queries, keys]`` is; looked up once per call of the model.

    Returns:
        An int64 scalar on the CPU: the code of a ``MaskKind`` (``CAUSAL``), or ``ANY``.
    """
    return torch.tensor(mask_kind_of(mask))


@mask_kind.register_fake
def _(mask: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64)


@torch.library.custom_op("qlora_fx::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T + mask) v``.

    Args:
        q: ``[batch, heads, sequence, size]``.
        k: ``[batch, key heads, sequence, size]``; ``heads`` is a multiple of ``key heads``.
        v: ``[batch, key heads, sequence, value size]``.
        mask: boolean, True where a key is seen, ``[batch or 1, heads or 1, sequence, sequence]``; None: causal.
        kind: what ``mask_kind(mask)`` said.
        scale: of the scores.

    Returns:
        ``[batch, heads, sequence, value size]`` with the strides of a transposed ``[batch, sequence, heads, ...]``;
        a query that sees no key gets zeros. And for backward the float32 log-sum-exp of the scores,
        ``[batch, heads, sequence]``.
    """
    inputs = Inputs(q, k, v, Mask.of(mask, kind), scale)
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention`` for ``q``, ``k`` and ``v``, contiguous and in their dtypes."""
    inputs = Inputs(q, k, v, Mask.of(mask, kind), scale)
    return kernel_for(inputs).backward(inputs, out, lse, grad)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, kind, scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask, kind)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    dq, dk, dv = ops.attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None, None


torch.library.register_autograd("qlora_fx::attention", _backward, setup_context=_context)


# -- over a cache ----------------------------------------------------------------------------------


FEW = 16
"""Tokens up to which scores over a cache are held."""


def cached_attention(
    q: Tensor, past_k: Tensor, k: Tensor, past_v: Tensor, v: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """``softmax(scale * q [past_k, k]^T + mask) [past_v, v]``.

    For few tokens neither keys nor values are copied or repeated: both parts are multiplied for themselves, and query
    heads that share a key head are rows of one product. More go through PyTorch's kernel, which holds no scores.

    Args:
        q: ``[batch, heads, tokens, size]``.
        past_k, past_v: of a cache, ``[earlier tokens, batch, key heads, size]``.
        k, v: ``[batch, key heads, tokens, size]``; ``heads`` is a multiple of ``key heads``.
        mask: ``[batch or 1, heads or 1, tokens, earlier tokens + tokens]``: boolean, True where a key is seen, or
            added to the scores.
        scale: of the scores.

    Returns:
        ``[batch, heads, tokens, value size]`` with the strides of a transposed ``[batch, tokens, heads, ...]``; a query
        that sees no key gets zeros.
    """
    batch, heads, tokens, size = q.shape
    groups = heads // k.shape[1]
    earlier = past_k.shape[0]
    keys, values = (t.permute(1, 2, 0, 3) for t in (past_k, past_v))
    if tokens > FEW:
        keys, values = (
            torch.cat(pair, 2).repeat_interleave(groups, 1) for pair in ((keys, k), (values, v))
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    rows = q.reshape(batch, k.shape[1], groups * tokens, size) * scale
    scores = torch.cat([rows @ keys.transpose(2, 3), rows @ k.transpose(2, 3)], -1).float()
    scores = scores.view(batch, k.shape[1], groups, tokens, -1)
    by_head = (
        mask.unsqueeze(2)
        if mask.shape[1] == 1
        else mask.reshape(mask.shape[0], -1, groups, *mask.shape[2:])
    )
    if mask.dtype == torch.bool:
        shares = scores.masked_fill(~by_head, -math.inf).softmax(-1)
        shares = shares.masked_fill(~by_head.any(-1, keepdim=True), 0.0)
    else:
        shares = (scores + by_head).softmax(-1)
    shares = shares.to(v.dtype).view(batch, k.shape[1], groups * tokens, -1)
    out = shares[..., :earlier] @ values + shares[..., earlier:] @ v
    return out.view(batch, heads, tokens, -1).transpose(1, 2).contiguous().transpose(1, 2)


def _cached_fake(
    q: Tensor, past_k: Tensor, k: Tensor, past_v: Tensor, v: Tensor, *_: Any
) -> Tensor:
    return empty_output(q, v)[0]


# Not a ``custom_op``, as linear_4bit.
torch.library.define(
    "qlora_fx::cached_attention",
    "(Tensor q, Tensor past_k, Tensor k, Tensor past_v, Tensor v, Tensor mask, float scale) -> Tensor",
    tags=ANY_STRIDES,
)
torch.library.impl("qlora_fx::cached_attention", ["CPU", "CUDA"])(cached_attention)
torch.library.register_fake("qlora_fx::cached_attention")(_cached_fake)


def _cached_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _cached_backward(ctx: Any, grad: Tensor) -> Any:
    def again(*tensors: Any) -> Tensor:
        q, past_k, k, past_v, v, mask = tensors
        return cached_attention(q, past_k, k, past_v, v, mask, ctx.scale)

    return *gradients(again, ctx.saved_tensors, ctx.needs_input_grad[:-1], grad), None


torch.library.register_autograd(
    "qlora_fx::cached_attention", _cached_backward, setup_context=_cached_context
)
