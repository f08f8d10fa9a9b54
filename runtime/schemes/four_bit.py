"""4-bit storage of one weight, byte for byte bitsandbytes' own layout.

Layout (bitsandbytes 0.50, ``functional.quantize_4bit``): the weight ``[out, in]`` is flattened row-major,
two values per byte, the even element in the high nibble, ``packed`` of shape ``[ceil(n / 2), 1]``
(viewed as ``quant_storage``); one float32 ``absmax`` per block of ``blocksize`` values. With double
quantization (QLoRA, arXiv:2305.14314, section 3) ``offset = mean(absmax)`` and ``absmax - offset`` is
stored in 8 bits in blocks of 256, each with a float32 ``nested_absmax``, under the signed dynamic map
``nested_quant_map`` of 256 float32, which is the same for every weight and held once.

At 64 values per block this is 4 + 32/64 = 4.5 bits per weight, or 4 + 8/64 + 32/(64*256) = 4.127 with
double quantization.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import bitsandbytes.functional as bnb
import torch

from ...errors import ConfigError
from ..ops import NESTED_BLOCKSIZE, whole_rows
from .blocks import PIECE, MatrixQuantizer, pieces_of

_bnb = torch.ops.bitsandbytes

NESTED_QUANT_MAP = "nested_quant_map"
"""Store key of the one shared map of the nested absmax."""
QUANT_MAP = "quant_map"
"""Store key of the 16 values of the 4-bit type, for looking up single rows."""


def layout(
    shape: tuple[int, ...], quantization: Any, *, name: str = "a weight"
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored part of the weight ``name``, without any data.

    Args:
        shape: ``[out, in]``, or ``[experts, out, in]``: then each expert is stored by itself and each part
            but the shared map has a leading dimension of experts.

    Raises:
        ConfigError: if the packed bytes do not fill whole elements of the storage dtype.
    """
    stack, n = shape[:-2], shape[-2] * shape[-1]
    packed, itemsize = (n + 1) // 2, quantization.storage_dtype.itemsize
    if packed % itemsize:
        raise ConfigError(
            f"{packed} packed bytes of {name} {list(shape)} do not divide into "
            f"{quantization.storage_dtype} elements; accepted: bnb_4bit_quant_storage='uint8'"
        )
    blocks = -(-n // quantization.blocksize)
    parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "packed": ((*stack, packed // itemsize, 1), quantization.storage_dtype)
    }
    if not quantization.double_quant:
        return parts | {"absmax": ((*stack, blocks), torch.float32)}
    return parts | {
        "absmax": ((*stack, blocks), torch.uint8),
        "nested_absmax": ((*stack, -(-blocks // NESTED_BLOCKSIZE)), torch.float32),
        "offset": (stack, torch.float32),
        "nested_quant_map": ((256,), torch.float32),
    }


def quantize_weight(weight: torch.Tensor, quantization: Any) -> dict[str, torch.Tensor]:
    """The stored parts of a dense ``[out, in]`` or ``[experts, out, in]`` weight, with the keys of ``layout``.

    Byte for byte what ``bitsandbytes.functional.quantize_4bit`` makes of it, on the weight's device.
    """
    builder = StorageBuilder(tuple(weight.shape), quantization, weight.device)
    for i in range(builder.matrices):
        matrix = weight[i] if weight.dim() == 3 else weight
        builder.add(i, pieces_of(matrix, quantization.blocksize))
    return builder.parts


class StorageBuilder:
    """Storage of a weight, filled matrix by matrix.

    Args:
        shape: ``[out, in]`` or ``[experts, out, in]``.
        quantization: settings, as ``config.Quantization``.
        device: where the storage is.

    Attributes:
        parts: with the keys of ``layout``; whole when every matrix was added.
        matrices: how many there are.
        finite: False if a value was NaN or infinite.
    """

    def __init__(
        self, shape: tuple[int, ...], quantization: Any, device: torch.device | str = "cpu"
    ) -> None:
        self.quantization = quantization
        self.blocks = -(-shape[-2] * shape[-1] // quantization.blocksize)
        self.stacked = len(shape) == 3
        self.matrices = shape[0] if self.stacked else 1
        self.finite = True
        self.parts = {
            name: torch.empty(size, dtype=dtype, device=device)
            for name, (size, dtype) in layout(shape, quantization).items()
        }

    def add(self, index: int, pieces: Iterable[torch.Tensor]) -> None:
        """Quantize matrix ``index`` from its elements, flat, in pieces of whole blocks."""
        packed = self.parts["packed"]
        matrix = MatrixQuantizer(
            packed[index] if self.stacked else packed, self.blocks, self.quantization
        )
        for piece in pieces:
            matrix.add(piece)
        self.finite &= matrix.finite
        for name, value in matrix.finish().items():
            part = self.parts[name]
            stacked = self.stacked and name != "nested_quant_map"
            (part[index] if stacked else part).copy_(value)


def quant_state(
    parts: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, quantization: Any
) -> bnb.QuantState:
    """bitsandbytes' own description of stored parts of one matrix, for its functions and for checkpoints.

    Args:
        parts: what ``quantize_weight`` returned.
        shape: ``[out, in]`` of the dense weight.
        dtype: dtype to dequantize to.
    """
    q = quantization
    nested = None
    if q.double_quant:
        nested = bnb.QuantState(
            absmax=parts["nested_absmax"],
            code=parts["nested_quant_map"],
            blocksize=NESTED_BLOCKSIZE,
            dtype=torch.float32,
        )
    return bnb.QuantState(
        absmax=parts["absmax"],
        shape=torch.Size(shape),
        code=bnb.get_4bit_type(q.quant_type, device=parts["packed"].device),
        blocksize=q.blocksize,
        quant_type=q.quant_type,
        dtype=dtype,
        offset=parts.get("offset"),
        state2=nested,
    )


def dequantize_weight(
    parts: dict[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype, quantization: Any
) -> torch.Tensor:
    """The dense ``[out, in]`` or ``[experts, out, in]`` weight in ``dtype`` that the stored parts stand for."""
    if len(shape) == 3:
        each = [
            {k: v if k == "nested_quant_map" else v[i] for k, v in parts.items()}
            for i in range(shape[0])
        ]
        return torch.stack([dequantize_weight(e, shape[1:], dtype, quantization) for e in each])
    rows = whole_rows(shape, quantization.blocksize)
    state = quant_state(parts, tuple(rows), dtype, quantization)
    dense: torch.Tensor = bnb.dequantize_4bit(parts["packed"], state)
    return dense.reshape(shape)


def dequantize_rows(
    parts: dict[str, torch.Tensor], shape: tuple[int, ...], quantization: Any, size: int = PIECE
) -> Iterator[torch.Tensor]:
    """``dequantize_weight`` of ``[out, in]`` in float32, some rows after the other: about ``size`` elements."""
    q = quantization
    absmax = parts["absmax"]
    if q.double_quant:
        absmax = _bnb.dequantize_blockwise(
            absmax,
            parts["nested_absmax"],
            parts["nested_quant_map"],
            NESTED_BLOCKSIZE,
            torch.float32,
        )
        absmax = absmax + parts["offset"]
    packed = parts["packed"].detach().reshape(-1).view(torch.uint8)
    inn = shape[1]
    for start, stop in row_ranges(shape, q.blocksize, size):
        codes = packed[start * inn // 2 : -(-stop * inn // 2)].reshape(-1, 1)
        scales = absmax[start * inn // q.blocksize : -(-stop * inn // q.blocksize)]
        rows = [stop - start, inn]
        whole = whole_rows(rows, q.blocksize)
        dense = _bnb.dequantize_4bit(codes, scales, q.blocksize, q.quant_type, whole, torch.float32)
        yield dense.reshape(rows)


def row_ranges(
    shape: tuple[int, ...], blocksize: int, size: int = PIECE
) -> Iterator[tuple[int, int]]:
    """Ranges of rows of ``[out, in]`` that are whole blocks, but for the last."""
    unit = blocksize // math.gcd(blocksize, shape[1])
    step = max(size // (unit * shape[1]), 1) * unit
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
