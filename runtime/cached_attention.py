"""Attention of new tokens over a cache, as one operator."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from . import cpu_kernels
from .attention_kernels.kernel import empty_output
from .ops import ANY_STRIDES, gradients

FEW = 16
"""Tokens up to which scores over a cache are held."""
WIDTH = 8
"""Head sizes must be a multiple of it for the compiled kernel."""
SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of the C functions' names."""


def cached_attention(
    q: Tensor, past_k: Tensor, k: Tensor, past_v: Tensor, v: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """``softmax(scale * q [past_k, k]^T + mask) [past_v, v]``.

    For few tokens neither keys nor values are copied or repeated. On a CPU ``cached_attention.cpp`` computes them;
    elsewhere both parts are multiplied for themselves, and query heads that share a key head are rows of one product.
    More tokens go through PyTorch's kernel, which holds no scores.

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
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (q, past_k, k, past_v, v)):
        found = by_kernel(q, past_k, k, past_v, v, mask, scale)
        if found is not None:
            return found
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


class Arguments(ctypes.Structure):
    """Mirrors ``Arguments`` in cached_attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "tokens", "earlier")),
        *((name, ctypes.c_int64) for name in ("size", "value_size", "threads", "is_boolean")),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "past_k", "k", "past_v", "v")),
        ("mask_strides", ctypes.c_int64 * 4),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "past_k", "k", "past_v", "v", "mask", "out")),
    )


def by_kernel(
    q: Tensor, past_k: Tensor, k: Tensor, past_v: Tensor, v: Tensor, mask: Tensor, scale: float
) -> Tensor | None:
    """``cached_attention`` by the compiled kernel; None where there is none, or it does not take these tensors."""
    if q.device.type != "cpu" or q.dtype not in SUFFIXES or not q.numel():
        return None
    if any(t.dtype != q.dtype for t in (past_k, k, past_v, v)):
        return None
    if q.shape[3] % WIDTH or v.shape[3] % WIDTH:
        return None
    functions = cpu_kernels.compiled("cached_attention.cpp", cpu_kernels.FUSED)
    if functions is None:
        return None
    batch, heads, tokens, size = q.shape
    earlier, total = past_k.shape[0], past_k.shape[0] + tokens
    tensors = [t if t.stride(3) == 1 else t.contiguous() for t in (q, past_k, k, past_v, v)]
    boolean = mask.dtype == torch.bool
    shown = (mask if boolean else mask.float()).expand(batch, heads, tokens, total)
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    sizes = (batch, heads, k.shape[1], tokens, earlier, size, v.shape[3])
    cpu_kernels.run(
        getattr(functions, f"cached_attention_{SUFFIXES[q.dtype]}"),
        Arguments(
            *sizes,
            torch.get_num_threads(),
            boolean,
            *(t.stride()[:3] for t in tensors),
            shown.stride(),
            scale,
            *(t.data_ptr() for t in (*tensors, shown, out)),
        ),
    )
    return out.transpose(1, 2)


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
