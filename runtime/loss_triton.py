"""The losses of rows of logits and their gradients on a GPU: one kernel that reads each row twice and writes it once.

PyTorch's operators would read and write the logits in float32 some ten times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

BLOCK = 4096
"""Logits that a program holds at a time."""

if has_triton_package():
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def logit(  # type: ignore[no-untyped-def]
        pointer, bias, columns, inside, scale, softcap, BIAS: tl.constexpr, CAP: tl.constexpr
    ):  # fmt: skip
        """``cap(scale * (value + bias))`` in float32, and the cap's slope."""
        x = tl.load(pointer + columns, mask=inside, other=0).to(tl.float32)
        if BIAS:
            x += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
        x *= scale
        slope = scale + 0 * x
        if CAP:
            ratio = x / softcap
            tanh = 1 - 2 / (tl.exp(2 * ratio) + 1)
            x = softcap * tanh
            slope *= 1 - tanh * tanh
        return tl.where(inside, x, float("-inf")), slope

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        logits, bias, labels, losses, stride, scale, softcap,
        VOCABULARY: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per row."""
        row = tl.program_id(0).to(tl.int64)
        pointer = logits + row * stride
        label = tl.load(labels + row)
        top = float("-inf")
        total = 0.0
        right = 0.0
        for start in range(0, VOCABULARY, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x, _ = logit(pointer, bias, columns, columns < VOCABULARY, scale, softcap, BIAS, CAP)
            highest = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - highest) + tl.sum(tl.exp(x - highest), 0)
            top = highest
            right += tl.sum(tl.where(columns == label, x, 0.0), 0)
        tl.store(losses + row, tl.log(total) + top - right)
        for start in range(0, VOCABULARY, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < VOCABULARY
            x, slope = logit(pointer, bias, columns, inside, scale, softcap, BIAS, CAP)
            grad = (tl.exp(x - top) / total - tl.where(columns == label, 1.0, 0.0)) * slope
            tl.store(pointer + columns, grad.to(logits.dtype.element_ty), mask=inside)


def losses_to_gradients(
    logits: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float
) -> Tensor:
    """As ``loss.losses_to_gradients``: the sum of the rows' losses; ``logits`` ``[rows, vocabulary]`` becomes its gradient.

    ``labels`` are of every row.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    fixed: dict[str, Any] = {
        "VOCABULARY": vocabulary,
        "BIAS": bias is not None,
        "CAP": bool(softcap),
        "BLOCK": block,
    }
    kernel[(rows,)](
        logits,
        logits if bias is None else bias,
        labels,
        losses,
        logits.stride(0),
        float(scale),
        float(softcap or 1),
        **fixed,
        num_warps=8,
    )
    return losses.sum()
