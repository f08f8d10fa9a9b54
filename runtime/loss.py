"""Cross-entropy of a linear head without its logits, as an operator that torch.compile takes whole.

The logits of one training step are often its largest tensor: ``[tokens, vocabulary]``, in float32, and once
more for their gradient. Here rows go in chunks; each chunk's logits become their own gradient in place, and
that becomes the gradient of the hidden state at once, while it is in the cache. Rows without a label cost
nothing. The head is frozen, so no weight gradient is formed: the products are one forward and one for the
input, as few as there can be. (``torch.nn.functional.linear_cross_entropy`` of torch 2.13 chunks too, but
does more products than a frozen head needs and cannot be compiled.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import loss_triton
from .gpu import runs_triton
from .ops import dequantized, scales


class Sizes(NamedTuple):
    """How much is computed at a time.

    Attributes:
        chunk: bytes of logits held.
        tile: bytes of logits in float32, where PyTorch's operators turn them into gradients.
        vocabulary: rows of a head that are dequantized or cast; a multiple of every blocksize.
    """

    chunk: int
    tile: int
    vocabulary: int


SIZES = {
    "cpu": Sizes(32 << 20, 4 << 20, 8192),  # what caches hold
    "cuda": Sizes(256 << 20, 64 << 20, 32768),  # what fills a GPU: 1,000 rows of 128,000 in 16 bits
}
"""By type of device."""


def sizes_on(device: torch.device) -> Sizes:
    return SIZES.get(device.type, SIZES["cpu"])


def rows_of_a_chunk(vocabulary: int, itemsize: int, device: torch.device) -> int:
    return max(1, sizes_on(device).chunk // (vocabulary * itemsize))


@torch.library.custom_op("qlora_fx::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    shape: Sequence[int],
    blocksize: int,
    quant_type: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum(cross_entropy(cap(scale * (x W^T + bias)), labels))`` over the rows that have a label.

    Args:
        x: ``[rows, in]``; its dtype is that of the products.
        weight: ``[W]``, dense ``[vocabulary, in]`` of any floating-point dtype, or its 4-bit storage ``[packed, absmax]``,
            ``[packed, absmax, nested_absmax, offset, nested_quant_map]``.
        bias: ``[vocabulary]``.
        labels: ``[rows]`` int64; ``ignore_index`` where there is none.
        scale: factor of the logits.
        softcap: ``c`` in ``c * tanh(logits / c)``, as Gemma 2 has it (arXiv:2408.00118); 0 for none.
        shape: ``[vocabulary, in]``.
        blocksize, quant_type: of the storage; ``quant_type`` is empty for a dense weight.
        with_grad: False leaves the gradient undefined.

    Returns:
        The sum, float32; the number of rows with a label, float32; and the gradient of the sum for ``x``,
        ``[rows, in]``, in its dtype.
    """
    rows = (labels != ignore_index).nonzero().flatten()
    every = len(rows) == len(labels)
    picked, wanted = (x, labels) if every else (x[rows], labels[rows])
    total = torch.zeros((), dtype=torch.float32, device=x.device)
    grad = torch.empty_like(picked)
    head = Head(weight, shape, blocksize, quant_type, x.dtype)
    step = rows_of_a_chunk(shape[0], x.element_size(), x.device)
    memory = x.new_empty(min(step, len(rows)), shape[0])
    for start in range(0, len(rows), step):
        chunk = picked[start : start + step]
        logits = memory[: len(chunk)]
        for first, stop, part in head.parts():
            if stop - first == shape[0]:
                torch.mm(chunk, part.t(), out=logits)
            else:
                logits[:, first:stop] = torch.mm(chunk, part.t())
        total += losses_to_gradients(logits, bias, wanted[start : start + step], scale, softcap)
        if with_grad:
            grad[start : start + step] = head.backward(logits)
    if not every:
        grad = x.new_zeros(x.shape).index_copy_(0, rows, grad)
    count = torch.full((), len(rows), dtype=torch.float32, device=x.device)
    return total, count, grad


@linear_cross_entropy.register_fake
def _(
    x: Tensor, weight: Sequence[Tensor], bias: Tensor | None, labels: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, _, shape, *_ = options
    torch._check(x.shape[1] == shape[1])  # type: ignore[no-untyped-call]
    torch._check(x.shape[0] == labels.shape[0])  # type: ignore[no-untyped-call]
    scalar = x.new_empty((), dtype=torch.float32)
    return scalar, scalar.clone(), x.new_empty(x.shape)


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[2])
    ctx.stored = len(inputs[1])


def _backward(ctx: Any, grad_total: Tensor, *_: Any) -> Any:
    (grad,) = ctx.saved_tensors
    dx = (grad * grad_total).to(grad.dtype)
    return dx, [None] * ctx.stored, *(None for _ in range(9))


torch.library.register_autograd("qlora_fx::linear_cross_entropy", _backward, setup_context=_context)


def workspace(
    rows: Any,
    vocabulary: int,
    inner: int,
    itemsize: int,
    *,
    dense: bool,
    device: torch.device,
    smaller: Any = min,
) -> Any:
    """Bytes that ``linear_cross_entropy`` takes for itself while it runs, if all rows but a few have a label.

    Args:
        rows: a number, or a symbol where ``smaller`` takes symbols.
        dense: whether the head is read as it is stored, neither dequantized nor cast.
    """
    sizes = sizes_on(device)
    chunk = smaller(rows, rows_of_a_chunk(vocabulary, itemsize, device))
    in_place = itemsize == 4 or device.type == "cuda"  # by loss_triton
    tile = 0 if in_place else smaller(rows, max(1, sizes.tile // (4 * vocabulary)))
    total = chunk * vocabulary * itemsize + 4 * tile * vocabulary + chunk * inner * itemsize
    total += 2 * rows * inner * itemsize  # those rows, and their gradient
    if not dense:  # two parts of the head at the change, their logits, and a sum in float32
        part = min(sizes.vocabulary, vocabulary)
        total += 2 * part * inner * itemsize + chunk * part * itemsize + 8 * chunk * inner
    return total


def losses_to_gradients(
    logits: Tensor, bias: Tensor | None, labels: Tensor, scale: float, softcap: float
) -> Tensor:
    """The sum of the rows' losses; ``logits`` becomes its gradient, before scale, cap and bias."""
    if runs_triton(logits.device):
        return loss_triton.losses_to_gradients(logits, bias, labels, scale, softcap)
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    step = min(len(logits), max(1, sizes_on(logits.device).tile // (4 * logits.shape[1])))
    low = logits.dtype != torch.float32
    if low:
        memory = torch.empty(step, logits.shape[1], dtype=torch.float32, device=logits.device)
    for start in range(0, len(logits), step):
        tile = logits[start : start + step]
        label = labels[start : start + step, None]
        p = memory[: len(tile)].copy_(tile) if low else tile
        if bias is not None:
            p = p.add_(bias)
        if scale != 1:
            p = p.mul_(scale)
        slope = None
        if softcap:
            p = p.div_(softcap).tanh_()
            slope = 1 - p * p
            p = p.mul_(softcap)
        top = p.amax(-1, keepdim=True)
        right = p.gather(1, label)
        sums = p.sub_(top).exp_().sum(-1, keepdim=True)
        total += (sums.log() + top - right).sum()
        p.div_(sums).scatter_add_(1, label, torch.full_like(right, -1))
        if slope is not None:
            p.mul_(slope)
        if scale != 1:
            p.mul_(scale)
        if low:
            tile.copy_(p)
    return total


class Head:
    """A head's weight in the dtype of the products, whole or by parts of the vocabulary."""

    def __init__(
        self,
        weight: Sequence[Tensor],
        shape: Sequence[int],
        blocksize: int,
        quant_type: str,
        dtype: torch.dtype,
    ) -> None:
        self.weight, self.dtype = weight[0], dtype
        self.vocabulary, self.inner = shape
        self.blocksize, self.quant_type = blocksize, quant_type
        if not quant_type:
            return
        self.absmax = scales(*weight[1:])

    def parts(self) -> Iterator[tuple[int, int, Tensor]]:
        """``(first, stop, weight[first:stop])``; one part where nothing has to be computed."""
        if not self.quant_type and self.weight.dtype == self.dtype:
            yield 0, self.vocabulary, self.weight
            return
        size = sizes_on(self.weight.device).vocabulary
        for first in range(0, self.vocabulary, size):
            stop = min(first + size, self.vocabulary)
            if self.quant_type:
                yield first, stop, self.dequantized(first, stop)
            else:
                yield first, stop, self.weight[first:stop].to(self.dtype)

    def dequantized(self, first: int, stop: int) -> Tensor:
        """Rows of whole blocks, for ``Sizes.vocabulary`` is a multiple of the blocksize."""
        size = self.inner
        packed = self.weight.view(torch.uint8)[first * size // 2 : (stop * size + 1) // 2]
        scale = self.absmax[first * size // self.blocksize : -(-stop * size // self.blocksize)]
        shape = (stop - first, size)
        return dequantized(packed, scale, self.blocksize, self.quant_type, shape, self.dtype)

    def backward(self, grad: Tensor) -> Tensor:
        """``grad @ weight``, added up in float32 over parts."""
        total: Tensor | None = None
        for first, stop, part in self.parts():
            if stop - first == self.vocabulary:
                return torch.mm(grad, part)
            product = torch.mm(grad[:, first:stop], part).float()
            total = product if total is None else total.add_(product)
        assert total is not None
        return total.to(self.dtype)
