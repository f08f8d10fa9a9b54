"""Causal attention for CPUs that skips what the mask hides, as operators that torch.compile takes whole.

PyTorch's own CPU kernel reads the whole mask and, up to 512 keys, computes every score. Here queries go in
blocks of rows and each block meets only the keys before its end. Scores, softmax and its gradient are in
float32; products with the probabilities are in the dtype of the inputs. Query heads that share a key head are
rows of the same product, so keys and values are never repeated. Nothing is kept for backward but the inputs
and the result: the probabilities are computed again.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .ops import ops

aten = torch.ops.aten

ANY, WITHIN_CAUSAL, CAUSAL = 0, 1, 2
"""What ``mask_kind`` tells: nothing; no key after its query is seen (padding, windows); exactly causal."""

BLOCK = 128
LONG = 768
"""Queries above which PyTorch's kernel, which then skips blocks of 512 keys, is faster than ours."""
SCORES_BYTES = 4 << 20
"""Scores computed at a time, so that they stay in the cache."""


@torch.library.custom_op("qlora_fx::mask_kind", mutates_args=())
def mask_kind(mask: Tensor) -> Tensor:
    """Whether a boolean mask ``[batch or 1, 1, queries, keys]`` is causal; looked up once per call of the model.

    Returns:
        An int64 scalar on the CPU: ``ANY``, ``WITHIN_CAUSAL`` or ``CAUSAL``.
    """
    rows, columns = mask.shape[-2:]
    kind = ANY
    if mask.dtype == torch.bool and rows == columns:
        causal = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril()
        if torch.equal(mask, causal.expand_as(mask)):
            kind = CAUSAL
        elif not bool((mask & ~causal).any()):
            kind = WITHIN_CAUSAL
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
        mask: boolean, True where a key is seen, broadcast to ``[batch, heads, sequence, sequence]``; None: causal.
        kind: what ``mask_kind(mask)`` said.
        scale: of the scores.

    Returns:
        ``[batch, heads, sequence, value size]`` with the strides of a transposed ``[batch, sequence, heads, ...]``;
        a query that sees no key gets zeros. And for backward the float32 log-sum-exp of the scores,
        ``[batch, heads, sequence]``, zero where backward computes the scores again.
    """
    how = way(mask, kind)
    out, lse = like_output(q, v)
    if pytorchs_is_faster(how, q, v):
        y, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            q, repeated(k, q), repeated(v, q), 0.0, True, scale=scale
        )
        out.copy_(y)
        lse.copy_(sums)
        return out, lse
    query, key = q.float() * scale, k.float()
    for part in blocks(q, k, how):
        p = part.probabilities(query, key, None if how == CAUSAL else mask)
        o = torch.bmm(part.low(p, v.dtype), part.keys(v))
        part.queries_of(out).copy_(part.unfold(o))
    return out, lse.zero_()


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
    how = way(mask, kind)
    if pytorchs_is_faster(how, q, v):
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, repeated(k, q), repeated(v, q), out, lse, 0.0, True, scale=scale
        )
        return dq.contiguous(), shared(dk, k), shared(dv, v)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (k, v))
    query, key, value, grad32 = q.float() * scale, k.float(), v.float(), grad.float()
    deltas = (grad32 * out).sum(-1, keepdim=True)
    for part in blocks(q, k, how):
        p = part.probabilities(query, key, None if how == CAUSAL else mask)
        g = part.fold(part.queries_of(grad))
        low = part.low(p, v.dtype)
        part.keys_of(dv).add_(part.heads(torch.bmm(low.transpose(1, 2), g)))
        ds = part.buffer("ds", torch.float32)
        g32 = part.fold(part.queries_of(grad32))
        torch.bmm(g32, part.keys(value).transpose(1, 2), out=ds)
        ds.sub_(part.fold(part.queries_of(deltas)))
        low = part.low(ds.mul_(p).mul_(scale), q.dtype)
        part.queries_of(dq).copy_(part.unfold(torch.bmm(low, part.keys(k))))
        rows = part.fold(part.queries_of(q))
        part.keys_of(dk).add_(part.heads(torch.bmm(low.transpose(1, 2), rows)))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


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


def way(mask: Tensor | None, kind: Tensor | None) -> int:
    return CAUSAL if mask is None or kind is None else int(kind)


def pytorchs_is_faster(how: int, q: Tensor, v: Tensor) -> bool:
    return how == CAUSAL and q.shape[2] > LONG and q.shape[3] == v.shape[3]


def like_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, rows, dtype=torch.float32)


def repeated(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values once per query head."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def shared(grad: Tensor, t: Tensor) -> Tensor:
    """The gradient of ``t`` from that of ``repeated(t)``."""
    batch, heads, rows, size = t.shape
    return grad.reshape(batch, heads, -1, rows, size).sum(2)


class Block:
    """Rows ``start:stop`` of the queries of some examples, and the first ``seen`` keys.

    Args:
        shape: examples, key heads, and query heads that share a key head.
    """

    def __init__(
        self,
        batch: slice,
        start: int,
        stop: int,
        seen: int,
        shape: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        self.batch, self.start, self.stop, self.seen = batch, start, stop, seen
        self.count, self.key_heads, self.shared = shape
        self.device = device

    def buffer(self, name: str, dtype: torch.dtype) -> Tensor:
        """Room for ``[examples * key heads, shared * rows, keys]``."""
        shape = (self.count * self.key_heads, self.shared * (self.stop - self.start), self.seen)
        return BUFFERS.get(name, math.prod(shape), dtype, self.device).view(shape)

    def low(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``t`` in a dtype, in a buffer of its own."""
        return t if t.dtype == dtype else self.buffer("low", dtype).copy_(t)

    def queries_of(self, t: Tensor) -> Tensor:
        return t[self.batch, :, self.start : self.stop]

    def keys_of(self, t: Tensor) -> Tensor:
        return t[self.batch, :, : self.seen]

    def keys(self, t: Tensor) -> Tensor:
        """``[examples * key heads, keys, size]``."""
        return self.keys_of(t).flatten(0, 1)

    def fold(self, t: Tensor) -> Tensor:
        """``[examples, heads, rows, size]`` to ``[examples * key heads, shared * rows, size]``."""
        return t.reshape(self.count * self.key_heads, -1, t.shape[3])

    def unfold(self, t: Tensor) -> Tensor:
        return t.view(self.count, self.key_heads * self.shared, -1, t.shape[2])

    def heads(self, t: Tensor) -> Tensor:
        return t.view(self.count, self.key_heads, t.shape[1], t.shape[2])

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax of the block's scores, from scaled queries and keys in float32."""
        scores = self.buffer("p", torch.float32)
        torch.bmm(self.fold(self.queries_of(q)), self.keys(k).transpose(1, 2), out=scores)
        at = self.unfold(scores)
        if mask is None:
            size = self.stop - self.start
            hidden = torch.full((size, size), float("-inf"), device=self.device).triu_(1)
            at[..., self.start :].add_(hidden)
            return torch.softmax(scores, -1, out=scores)
        examples = self.batch if mask.shape[0] > 1 else slice(None)
        seen = mask[examples, :, self.start : self.stop, : self.seen]
        at.add_(torch.zeros(seen.shape, device=self.device).masked_fill_(~seen, float("-inf")))
        p = torch.softmax(scores, -1, out=scores)
        if not bool(seen.any(-1).all()):
            p.masked_fill_(torch.isnan(p), 0.0)  # a query that sees no key
        return p


def blocks(q: Tensor, k: Tensor, how: int) -> Iterator[Block]:
    batch, heads, rows, _ = q.shape
    size = min(batch, max(1, SCORES_BYTES // (4 * heads * min(rows, BLOCK) * rows)))
    for first in range(0, batch, size):
        count = min(size, batch - first)
        for start in range(0, rows, BLOCK):
            shape = (count, k.shape[1], heads // k.shape[1])
            stop = min(start + BLOCK, rows)
            seen = rows if how == ANY else stop
            yield Block(slice(first, first + count), start, stop, seen, shape, q.device)


class Buffers(threading.local):
    """Flat buffers by name and dtype that live on: fresh memory would cost more than what is computed in it."""

    def __init__(self) -> None:
        self.tensors: dict[Any, Tensor] = {}

    def get(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, dtype, device)
        if key not in self.tensors or self.tensors[key].numel() < size:
            self.tensors[key] = torch.empty(size, dtype=dtype, device=device)
        return self.tensors[key][:size]


BUFFERS = Buffers()
