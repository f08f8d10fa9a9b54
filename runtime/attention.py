"""Causal attention for CPUs that skips what the mask hides, as operators that torch.compile takes whole.

PyTorch's own CPU kernel reads the whole mask, computes tiles that a causal mask hides up to 512 keys, and repeats
keys and values for the query heads that share them. ``attention.cpp`` does neither; it is compiled once per machine
with Inductor's settings and kept in Inductor's cache. Where it cannot be (no compiler, a CPU without oneDNN's block
products, float16, odd head sizes) PyTorch's kernel computes the same.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ops import ops

aten = torch.ops.aten

ANY, CAUSAL = 0, 1
"""What ``mask_kind`` tells: nothing, or that the mask is exactly causal and need not be read."""

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES = 16
"""Head sizes that are a multiple of it are taken by the compiled kernel."""


@torch.library.custom_op("qlora_fx::mask_kind", mutates_args=())
def mask_kind(mask: Tensor) -> Tensor:
    """Whether a boolean mask ``[batch or 1, 1, queries, keys]`` is causal; looked up once per call of the model.

    Returns:
        An int64 scalar on the CPU: ``ANY`` or ``CAUSAL``.
    """
    rows, columns = mask.shape[-2:]
    kind = ANY
    if mask.dtype == torch.bool and rows == columns:
        causal = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril()
        if torch.equal(mask, causal.expand_as(mask)):
            kind = CAUSAL
    return torch.tensor(kind)


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
    mask = needed(mask, kind)
    out, lse = like_output(q, v)
    if compiled("forward", q, k, v, mask, scale, out=out, lse=lse):
        return out, lse
    query, keys, values = alike(q, repeated(k, q), repeated(v, q))
    y, sums = aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, mask is None, attn_mask=added(mask, q), scale=scale
    )
    y = y[..., : v.shape[3]]
    out.copy_(y if mask is None else y.masked_fill(~mask.any(-1, keepdim=True), 0))
    lse.copy_(sums)
    return out, lse


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like_output(q, v)


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
    mask = needed(mask, kind)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    results = {"dq": dq, "dk": dk, "dv": dv}
    if compiled("backward", q, k, v, mask, scale, out=out, lse=lse, grad=grad, **results):
        return dq, dk, dv
    if mask is not None:  # a query that sees no key has no gradient, and its row is undefined there
        grad = grad.masked_fill(~mask.any(-1, keepdim=True), 0)
    query, keys, values, result, grad = alike(q, repeated(k, q), repeated(v, q), out, grad)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(grad, query, keys, values, result, lse, 0.0, mask is None),
        attn_mask=added(mask, q),
        scale=scale,
    )
    dq, dk, dv = dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]
    return dq.contiguous(), shared(dk, k), shared(dv, v)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, mask, kind, scale = inputs
    ctx.save_for_backward(q, k, v, *output, mask, kind)
    ctx.scale = scale


def _backward(ctx: Any, grad: Tensor, _: Any) -> Any:
    dq, dk, dv = ops.attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return dq, dk, dv, None, None, None


torch.library.register_autograd("qlora_fx::attention", _backward, setup_context=_context)


def needed(mask: Tensor | None, kind: Tensor | None) -> Tensor | None:
    """The mask, or None where it is causal."""
    return None if mask is None or (kind is not None and int(kind) == CAUSAL) else mask


def like_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, rows, dtype=torch.float32)


# -- PyTorch's kernel ------------------------------------------------------------------------------


def repeated(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values once per query head."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def shared(grad: Tensor, t: Tensor) -> Tensor:
    """The gradient of ``t`` from that of ``repeated(t)``."""
    batch, heads, rows, size = t.shape
    return grad.reshape(batch, heads, -1, rows, size).sum(2)


def alike(*tensors: Tensor) -> list[Tensor]:
    """All with the largest head size, filled up with zeros: PyTorch's kernel wants one size."""
    size = max(t.shape[3] for t in tensors)
    return [torch.nn.functional.pad(t, (0, size - t.shape[3])) for t in tensors]


def added(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """The mask as numbers to add to scores; all zero in rows that see no key, where softmax is undefined."""
    if mask is None:
        return None
    hidden = ~mask & mask.any(-1, keepdim=True)
    return torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(hidden, float("-inf"))


# -- the compiled kernel ---------------------------------------------------------------------------


class Arguments(ctypes.Structure):
    """Mirrors ``Arguments`` in attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "rows", "size")),
        ("value_size", ctypes.c_int64),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out", "grad")),
        ("mask_strides", ctypes.c_int64 * 2),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out", "lse", "grad")),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv")),
    )


DONE, NO_MEMORY = 0, 1
"""What the functions return; anything else: this CPU, as it is set, has not the products."""


def compiled(
    direction: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    **others: Tensor,
) -> bool:
    """Run the compiled kernel.

    Returns:
        False where it cannot take these tensors; nothing was written then.
    """
    if q.dtype not in NAMES or q.shape[3] % LANES or v.shape[3] % LANES or not q.numel():
        return False
    if scale <= 0:  # the largest score is looked for before it is scaled
        return False
    functions = library()
    if functions is None:
        return False
    batch, heads, rows, size = q.shape
    given = Arguments(batch, heads, k.shape[1], rows, size, v.shape[3])
    given.scale, given.threads = scale, torch.get_num_threads()
    tensors = {"q": q, "k": k, "v": v, **others}
    for name in ("q", "k", "v", "grad"):
        if name in tensors and (tensors[name].stride(3) != 1 or tensors[name].stride(2) % 2):
            tensors[name] = tensors[name].contiguous()
    for name in ("q", "k", "v", "out", "grad"):
        if name in tensors:
            setattr(given, f"{name}_strides", tensors[name].stride()[:3])
    if mask is not None:
        for dim in (0, 1):
            if mask.stride(dim) == 0:  # expanded
                mask = mask.narrow(dim, 0, 1)
        mask = tensors["mask"] = mask.contiguous()
        steps = (mask.stride(dim) if mask.shape[dim] > 1 else 0 for dim in (0, 1))
        given.mask_strides = (ctypes.c_int64 * 2)(*steps)
    for name, tensor in tensors.items():
        setattr(given, name, tensor.data_ptr())
    status = getattr(functions, f"{direction}_{NAMES[q.dtype]}")(ctypes.byref(given))
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for attention over {list(q.shape)}")
    return bool(status == DONE)


@functools.cache
def library() -> Any:
    """attention.cpp, compiled; None where it cannot be.

    Takes some seconds where it is not in Inductor's cache.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    source = Path(__file__).with_suffix(".cpp").read_text(encoding="ascii")
    # Conversions to bfloat16 are one instruction then.
    flags = ("-mavx512bf16",) if torch.cpu._is_avx512_bf16_supported() else ()
    try:
        return CppCodeCache.load(source, extra_flags=flags, needs_vec_isa=True)
    except (CppCompileError, OSError, RuntimeError):
        return None
