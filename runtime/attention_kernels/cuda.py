"""Attention on a GPU: PyTorch's kernels, called by name, so that a causal mask is not read and heads are not repeated.

``scaled_dot_product_attention`` in a captured model has a mask, so that PyTorch never takes FlashAttention for it,
and is marked as random for the sake of dropout, so that recomputation keeps its result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..gpu import BFLOAT16, capability
from .kernel import Inputs, Kernel, Mask, empty_output
from .pytorch import (
    additive_mask,
    pad_to_one_size,
    repeat_heads,
    sum_over_heads,
    zero_where_nothing_is_seen,
)
from .varlen import Varlen, sequences_of

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)
FLASH_SIZE = 256
"""Largest head size of PyTorch's FlashAttention-2."""
ALIGNMENT = 8
"""Head sizes, and the rows of a bias, must be a multiple of it (16 bytes of 16 bits)."""
SUMS = 32
"""The memory-efficient kernel pads the rows of its log-sum-exp to a multiple of it (``kAlignLSE``)."""


class Flash(Kernel):
    """FlashAttention-2, ``aten::_scaled_dot_product_flash_attention``: causal, in 16 bits; keys stay as few as they are."""

    name = "flash"
    device = "cuda"

    def takes(self, inputs: Inputs) -> bool:
        return inputs.mask.seen is None and flash_takes(inputs)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v, _, scale = inputs
        query, keys, values = aligned(q, k, v)
        result, lse, *_ = aten._scaled_dot_product_flash_attention(
            query, keys, values, 0.0, True, return_debug_mask=False, scale=scale
        )
        return in_place_of_output(result, q, v), lse

    def backward(
        self, inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, scale = inputs
        query, keys, values, result, grad = aligned(q, k, v, out, grad)
        rows = q.shape[2]
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            grad, query, keys, values, result, lse, None, None, rows, rows, 0.0, True,
            *no_random_state(q), scale=scale,
        )  # fmt: skip
        return tuple(
            g[..., : t.shape[3]].contiguous() for g, t in zip((dq, dk, dv), (q, k, v), strict=True)
        )  # type: ignore[return-value]


def flash_takes(inputs: Inputs) -> bool:
    q, v = inputs.q, inputs.v
    return (
        q.dtype in HALF
        and max(q.shape[3], v.shape[3]) <= FLASH_SIZE
        and capability(q.device) >= BFLOAT16
    )


class VarlenFlash(Kernel):
    """FlashAttention-2 over sequences of any lengths, ``aten::_flash_attention_forward``: masks of intervals. Note [Sequences]."""

    name = "varlen"
    device = "cuda"
    takes_sequences = True

    def mask_code(self, mask: Tensor) -> int:
        return sequences_of(mask)[0]

    def takes(self, inputs: Inputs) -> bool:
        mask = inputs.mask
        return (
            mask.seen is not None
            and mask.cu_seqlens is not None
            and Varlen.of(mask.kind) is not None
            and mask.seen.shape[0] == inputs.q.shape[0]
            and flash_takes(inputs)
        )

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v, mask, scale = inputs
        query, keys, values = (one_behind_the_other(t) for t in aligned(q, k, v))
        results = [
            aten._flash_attention_forward(query, keys, values, *told, False, scale=scale, **window)[
                :2
            ]
            for told, window in calls(mask, q.shape[2])
        ]
        result, lse = results[0]
        if len(results) > 1:  # each query is of one call: zeros and +inf come out of the other
            result = result + results[1][0]
            lse = torch.minimum(lse, results[1][1])
        sums = lse.view(q.shape[1], q.shape[0], q.shape[2]).transpose(0, 1).contiguous()
        return in_place_of_output(in_rows(result, q), q, v), sums

    def backward(
        self, inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mask, scale = inputs
        query, keys, values, result, given = (
            one_behind_the_other(t) for t in aligned(q, k, v, out, grad)
        )
        sums = lse.transpose(0, 1).reshape(q.shape[1], -1)
        results = [
            aten._flash_attention_backward(
                given,
                query,
                keys,
                values,
                result,
                sums,
                *told,
                *no_random_state(q),
                scale=scale,
                **window,
            )
            for told, window in calls(mask, q.shape[2])
        ]
        found = results[0] if len(results) == 1 else [a + b for a, b in zip(*results, strict=True)]
        return tuple(
            in_rows(g, q)[..., : t.shape[3]].contiguous()
            for g, t in zip(found, (q, k, v), strict=True)
        )  # type: ignore[return-value]


def calls(mask: Mask, length: int) -> list[tuple[tuple[Any, ...], dict[str, int]]]:
    """What FlashAttention is told of the sequences, once or twice: starts, longest, no dropout, causal; and of windows."""
    kind = Varlen.of(mask.kind)
    assert kind is not None
    assert mask.cu_seqlens is not None
    starts = mask.cu_seqlens.flatten(1)
    count = min(kind.sequences, starts.shape[1] - 1) + 1
    window = {"window_size_left": kind.window - 1, "window_size_right": 0} if kind.window else {}
    told = (starts[0, :count], starts[1, :count], length, length, 0.0, kind.causal)
    found: list[tuple[tuple[Any, ...], dict[str, int]]] = [(told, window)]
    if kind.behind:
        count = 5 * mask.cu_seqlens.shape[2] + 2
        found.append(((starts[2, :count], starts[3, :count], length, length, 0.0, False), {}))
    return found


def one_behind_the_other(t: Tensor) -> Tensor:
    """``[batch * sequence, heads, size]`` of ``[batch, heads, sequence, size]``."""
    return t.transpose(1, 2).reshape(-1, t.shape[1], t.shape[3])


def in_rows(t: Tensor, q: Tensor) -> Tensor:
    """The inverse of ``one_behind_the_other``."""
    return t.view(q.shape[0], q.shape[2], *t.shape[1:]).transpose(1, 2)


class Efficient(Kernel):
    """The memory-efficient kernel, ``aten::_scaled_dot_product_efficient_attention``: any mask, up to 32 bits.

    It reads a mask as a bias, and wants keys and values once per query head.
    """

    name = "efficient"
    device = "cuda"

    def takes(self, inputs: Inputs) -> bool:
        return inputs.q.dtype in (*HALF, torch.float32) and inputs.q.numel() > 0

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v, mask, scale = inputs
        query, keys, values = aligned(q, repeat_heads(k, q), repeat_heads(v, q))
        result, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, keys, values, bias(mask, q), True, 0.0, mask.seen is None, scale=scale
        )
        result = zero_where_nothing_is_seen(result, mask)
        return in_place_of_output(result, q, v), lse[..., : q.shape[2]].contiguous()

    def backward(
        self, inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mask, scale = inputs
        grad = zero_where_nothing_is_seen(grad, mask)
        query, keys, values, result, grad = aligned(
            q, repeat_heads(k, q), repeat_heads(v, q), out, grad
        )
        sums = torch.nn.functional.pad(lse, (0, -lse.shape[2] % SUMS), value=float("inf"))
        dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, query, keys, values, bias(mask, q), result, sums, *no_random_state(q), 0.0,
            [True, True, True, False], mask.seen is None, scale=scale,
        )  # fmt: skip
        dq, dk, dv = dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]
        return dq.contiguous(), sum_over_heads(dk, k), sum_over_heads(dv, v)


class Definition(Kernel):
    """What attention is, with all scores held at once: for float64."""

    name = "definition"
    device = "cuda"

    def takes(self, inputs: Inputs) -> bool:
        return True

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, v = inputs.q, inputs.v
        p, sums = self.probabilities(inputs)
        out, lse = empty_output(q, v)
        return out.copy_(p @ repeat_heads(v, q)), lse.copy_(sums)

    def backward(
        self, inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, _, scale = inputs
        p, _ = self.probabilities(inputs)
        dp = grad @ repeat_heads(v, q).mT - (grad * out).sum(-1, keepdim=True)
        scores = scale * p * dp
        dq = scores @ repeat_heads(k, q)
        return dq, sum_over_heads(scores.mT @ q, k), sum_over_heads(p.mT @ grad, v)

    def probabilities(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Softmax, and the log-sum-exp of the scores."""
        q, k, _, mask, scale = inputs
        scores = scale * q @ repeat_heads(k, q).mT
        seen = mask.seen
        if seen is None:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
        p = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
        return p, scores.logsumexp(-1).masked_fill(~seen.any(-1), 0)


def aligned(*tensors: Tensor) -> list[Tensor]:
    """With heads of one size that the kernels can read: rows contiguous and aligned.

    The memory-efficient kernel's backward takes the layout of the output for granted, ``[batch, sequence, heads, size]``
    (``o_strideM`` in PyTorch's ``kernel_backward.h``): ``pad_to_one_size`` gives it.
    """
    whole = pad_to_one_size(*tensors, multiple=ALIGNMENT)
    return [t if readable(t) else t.contiguous() for t in whole]


def readable(t: Tensor) -> bool:
    steps = (s for s, size in zip(t.stride()[:3], t.shape, strict=False) if size > 1)
    return t.stride(3) == 1 and not any(s % ALIGNMENT for s in steps)


def in_place_of_output(result: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """The result with the strides of ``empty_output``, which it has unless heads were filled up."""
    out, _ = empty_output(q, v)
    result = result[..., : v.shape[3]]
    return result if result.stride() == out.stride() else out.copy_(result)


def bias(mask: Mask, q: Tensor) -> Tensor | None:
    """``additive_mask`` whose rows are aligned, expanded to ``[batch, heads, queries, keys]``."""
    if mask.seen is None:
        return None
    keys = mask.seen.shape[3]
    padded = torch.nn.functional.pad(mask.seen, (0, -keys % ALIGNMENT))
    added = additive_mask(Mask(padded, mask.kind), q)
    assert added is not None
    return added[..., :keys].expand(q.shape[0], q.shape[1], q.shape[2], keys)


def no_random_state(q: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and offset of a dropout that is none."""
    empty = torch.empty((), dtype=torch.int64, device=q.device)
    return empty, empty
