"""Quantize a matrix to 4 bits piece by piece, byte for byte as bitsandbytes does it whole.

Blocks are independent but for the offset of double quantization, the mean of all absmax. So pieces of whole
blocks may come one after the other, and only their absmax (4 bytes per block) is held until the end.

On a CPU bitsandbytes' own ``quantize_4bit`` makes six temporaries, the largest twice the size of a 16-bit weight,
and finds each code by a binary search (15 ns per weight on two cores here). The code of a value is the
number of midpoints between neighbouring codes that lie below it, so 15 vectorized comparisons count it, in
buffers that stay in the cache (3 ns). The comparisons are bitsandbytes' own, of the same float32 numbers;
tests/runtime/test_blocks.py holds the two beside each other on midpoints, zeros, denormals and extremes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import bitsandbytes.functional as bnb
import torch

from ...config import Quantization
from ..ops import NESTED_BLOCKSIZE

PIECE = 1 << 18
"""Elements quantized at a time: their buffers, 2.5 MB, stay in the cache."""
SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by at least this."""

_bnb = torch.ops.bitsandbytes


@functools.cache
def thresholds(quant_type: str) -> tuple[list[float], torch.Tensor | None]:
    """The 15 midpoints between neighbouring values of a 4-bit type, and which code each interval is.

    The second is None where the codes are in the order of their values (nf4).
    """
    values = bnb.get_4bit_type(quant_type, device="cpu")
    order = torch.argsort(values)
    midpoints = (values[order[:-1]] + values[order[1:]]) / 2
    in_order = torch.equal(order, torch.arange(16))
    return midpoints.tolist(), None if in_order else order.to(torch.uint8)


class MatrixQuantizer:
    """Fills the storage of one matrix from its elements.

    Args:
        packed: where the codes go, of the storage dtype, ``ceil(n / 2)`` bytes for ``n`` elements.
        blocks: how many absmax there are.
        quantization: settings.
    """

    def __init__(self, packed: torch.Tensor, blocks: int, quantization: Quantization) -> None:
        self.quantization = quantization
        self.packed = packed.reshape(-1).view(torch.uint8)
        self.absmax = torch.empty(blocks, device=packed.device)
        self.done = 0
        self.scratch: tuple[torch.Tensor, ...] = ()

    def add(self, piece: torch.Tensor) -> None:
        """Quantize the next elements: a flat tensor of whole blocks, or the last of the matrix.

        Args:
            piece: float32, bfloat16 or float16, contiguous.
        """
        size = self.quantization.blocksize
        whole = piece.numel() // size * size
        if self.packed.device.type != "cpu":
            self.by_bitsandbytes(piece.to(self.packed.device))
            return
        for at in range(0, whole, PIECE):
            self.whole_blocks(piece[at : min(at + PIECE, whole)])
        if (
            whole < piece.numel()
        ):  # bitsandbytes divides in a part of a block and multiplies in a whole one
            self.by_bitsandbytes(piece[whole:])

    def by_bitsandbytes(self, piece: torch.Tensor) -> None:
        q = self.quantization
        codes, absmax = _bnb.quantize_4bit(piece, q.blocksize, q.quant_type, torch.uint8)
        self.put(codes.reshape(-1), absmax, piece.numel())

    def put(self, codes: torch.Tensor, absmax: torch.Tensor, count: int) -> None:
        first = self.done // self.quantization.blocksize
        self.packed[self.done // 2 : self.done // 2 + codes.numel()].copy_(codes)
        self.absmax[first : first + absmax.numel()].copy_(absmax)
        self.done += count

    def whole_blocks(self, piece: torch.Tensor) -> None:
        size, count = self.quantization.blocksize, piece.numel()
        values, magnitude, above, codes = self.buffers(count)
        values.copy_(piece)
        absmax = torch.amax(torch.abs(values, out=magnitude).view(-1, size), 1)
        scale = absmax.clamp(min=SMALLEST_ABSMAX).reciprocal_()
        values.view(-1, size).mul_(scale.view(-1, 1))
        midpoints, order = thresholds(self.quantization.quant_type)
        codes.zero_()
        for midpoint in midpoints:
            torch.gt(values, midpoint, out=above)
            codes.add_(above.view(torch.uint8))
        if order is not None:
            codes.copy_(order[codes.int()])
        pairs = codes.view(
            torch.int16
        )  # the even element is the low byte, and goes to the high nibble
        packed = pairs.bitwise_right_shift(8).bitwise_or_(pairs.bitwise_left_shift(4))
        self.put(packed, absmax, count)

    def buffers(self, count: int) -> tuple[torch.Tensor, ...]:
        """Scratch for ``count`` elements, made once."""
        if not self.scratch or self.scratch[0].numel() < count:
            dtypes = (torch.float32, torch.float32, torch.bool, torch.uint8)
            self.scratch = tuple(torch.empty(count, dtype=dtype) for dtype in dtypes)
        return tuple(t[:count] for t in self.scratch)

    def finish(self) -> dict[str, torch.Tensor]:
        """``absmax``, and with double quantization ``nested_absmax``, ``offset`` and ``nested_quant_map``."""
        if not self.quantization.double_quant:
            return {"absmax": self.absmax}
        offset = self.absmax.mean()
        absmax, nested = bnb.quantize_blockwise(self.absmax - offset, blocksize=NESTED_BLOCKSIZE)
        return {
            "absmax": absmax,
            "nested_absmax": nested.absmax,
            "offset": offset,
            "nested_quant_map": nested.code,
        }

    @property
    def finite(self) -> bool:
        """False if an element was NaN or infinite."""
        return bool(torch.isfinite(self.absmax).all())


def pieces_of(matrix: torch.Tensor, blocksize: int, size: int = PIECE) -> Iterator[torch.Tensor]:
    """The elements of ``[out, in]``, of any strides, row by row, in flat pieces of whole blocks."""
    if matrix.is_contiguous():
        yield from torch.split(matrix.reshape(-1), size)
        return
    unit = blocksize // math.gcd(blocksize, matrix.shape[1])  # so many rows are whole blocks
    rows = max(size // (unit * matrix.shape[1]), 1) * unit
    for part in torch.split(matrix, rows):
        yield part.reshape(-1)


def row_ranges(
    shape: tuple[int, ...], blocksize: int = 64, size: int = PIECE
) -> Iterator[tuple[int, int]]:
    """Ranges of rows of ``[out, in]`` that are whole blocks, but for the last: about ``size`` elements each."""
    unit = blocksize // math.gcd(blocksize, shape[1])
    step = max(size // (unit * shape[1]), 1) * unit
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
