"""PyTorch's own kernel for CPUs, which takes everything.

It reads the whole mask, computes tiles that a causal mask hides up to 512 keys, and wants keys and values once per
query head and one size of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kernel import Inputs, Kernel, Mask, empty_output

aten = torch.ops.aten


class PyTorch(Kernel):
    """``aten::_scaled_dot_product_flash_attention_for_cpu``. Only causal masks without values are not read."""

    name = "pytorch"
    device = "cpu"

    def takes(self, inputs: Inputs) -> bool:
        return True

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        q, k, v, mask, scale = inputs
        out, lse = empty_output(q, v)
        query, keys, values = pad_to_one_size(q, repeat_heads(k, q), repeat_heads(v, q))
        result, sums = aten._scaled_dot_product_flash_attention_for_cpu(
            query,
            keys,
            values,
            0.0,
            mask.seen is None,
            attn_mask=additive_mask(mask, q),
            scale=scale,
        )
        out.copy_(zero_where_nothing_is_seen(result[..., : v.shape[3]], mask))
        lse.copy_(sums)
        return out, lse

    def backward(
        self, inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, mask, scale = inputs
        grad = zero_where_nothing_is_seen(grad, mask)
        query, keys, values, result, grad = pad_to_one_size(
            q, repeat_heads(k, q), repeat_heads(v, q), out, grad
        )
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            query,
            keys,
            values,
            result,
            lse,
            0.0,
            mask.seen is None,
            attn_mask=additive_mask(mask, q),
            scale=scale,
        )
        dq, dk, dv = dq[..., : q.shape[3]], dk[..., : k.shape[3]], dv[..., : v.shape[3]]
        return dq.contiguous(), sum_over_heads(dk, k), sum_over_heads(dv, v)


def repeat_heads(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values once per query head."""
    return t.repeat_interleave(q.shape[1] // t.shape[1], 1)


def sum_over_heads(grad: Tensor, t: Tensor) -> Tensor:
    """The gradient for ``t`` from that for ``repeat_heads(t, q)``."""
    batch, heads, rows, size = t.shape
    return grad.reshape(batch, heads, -1, rows, size).sum(2)


def pad_to_one_size(*tensors: Tensor, multiple: int = 1) -> list[Tensor]:
    """All with the largest head size, or the next multiple, filled up with zeros.

    What is filled up is laid out ``[batch, sequence, heads, size]``, as a model's heads are.
    """
    size = max(t.shape[3] for t in tensors)
    size += -size % multiple
    if all(t.shape[3] == size for t in tensors):
        return list(tensors)
    pad = torch.nn.functional.pad
    return [pad(t.transpose(1, 2), (0, size - t.shape[3])).transpose(1, 2) for t in tensors]


def additive_mask(mask: Mask, q: Tensor) -> Tensor | None:
    """What is added to the scores: all zero in rows that see no key, where softmax would be undefined."""
    if mask.seen is None:
        return None
    hidden = ~mask.seen & mask.seen.any(-1, keepdim=True)
    zeros = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
    return zeros.masked_fill_(hidden, float("-inf"))


def zero_where_nothing_is_seen(t: Tensor, mask: Mask) -> Tensor:
    """``t`` with zeros for queries that see no key, where the kernel computes as if they saw all."""
    if mask.seen is None:
        return t
    return t.masked_fill(~mask.seen.any(-1, keepdim=True), 0)
