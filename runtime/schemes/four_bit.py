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

from collections.abc import Iterable, Iterator, Mapping

import bitsandbytes.functional as bnb
import torch

from ...config import Quantization
from ...errors import CheckpointError, ConfigError
from ..ops import NESTED_BLOCKSIZE, dequantized, scales, whole_rows
from .blocks import MatrixQuantizer, pieces_of, row_ranges
from .scheme import PACKED, Part, Scheme

NESTED_QUANT_MAP = "nested_quant_map"
"""The one part that all weights share: the map of the nested absmax."""
QUANT_MAP = "quant_map"
"""Before the type in the store key of its 16 values, for looking up single rows."""


class FourBit(Scheme):
    """bitsandbytes' 4-bit storage. Of a stack each expert is stored by itself.

    Args:
        quantization: its type, blocksize, double quantization and storage dtype.
    """

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization

    def describe(self) -> str:
        q = self.quantization
        return (
            f"{q.quant_type}, blocksize {q.blocksize}, {'double' if q.double_quant else 'single'} quantization, held as "
            f"{str(q.storage_dtype).removeprefix('torch.')}"
        )

    def parts(self, shape: tuple[int, ...], *, name: str = "a weight") -> dict[str, Part]:
        """``packed`` and ``absmax``; with double quantization ``nested_absmax``, ``offset`` and the shared map.

        Raises:
            ConfigError: if the packed bytes do not fill whole elements of the storage dtype.
        """
        q = self.quantization
        stack, n = shape[:-2], shape[-2] * shape[-1]
        packed, itemsize = (n + 1) // 2, q.storage_dtype.itemsize
        if packed % itemsize:
            raise ConfigError(
                f"{packed} packed bytes of {name} {list(shape)} do not divide into "
                f"{q.storage_dtype} elements; accepted: bnb_4bit_quant_storage='uint8'"
            )
        blocks = -(-n // q.blocksize)
        parts = {PACKED: Part((*stack, packed // itemsize, 1), q.storage_dtype)}
        if not q.double_quant:
            return parts | {"absmax": Part((*stack, blocks), torch.float32)}
        return parts | {
            "absmax": Part((*stack, blocks), torch.uint8),
            "nested_absmax": Part((*stack, -(-blocks // NESTED_BLOCKSIZE)), torch.float32),
            "offset": Part(stack, torch.float32),
            NESTED_QUANT_MAP: Part((256,), torch.float32, shared=True),
        }

    def shared(self) -> frozenset[str]:
        return frozenset({NESTED_QUANT_MAP})

    # -- to storage -----------------------------------------------------------------------------------

    def builder(self, shape: tuple[int, ...], device: torch.device | str) -> FourBitBuilder:
        return FourBitBuilder(self, shape, device)

    def pieces(self, matrix: torch.Tensor) -> Iterator[torch.Tensor]:
        """Pieces of whole blocks, so that the bytes are those of ``bitsandbytes.functional.quantize_4bit``."""
        return pieces_of(matrix, self.quantization.blocksize)

    # -- from storage ---------------------------------------------------------------------------------

    def dequantize(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        if len(shape) == 3:
            each = (self.matrix(parts, i) for i in range(shape[0]))
            return torch.stack([self.dequantize(one, shape[1:], dtype) for one in each])
        rows = whole_rows(shape, self.quantization.blocksize)
        state = quant_state(parts, tuple(rows), dtype, self.quantization)
        dense: torch.Tensor = bnb.dequantize_4bit(parts[PACKED], state)
        return dense.reshape(shape)

    def rows(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
    ) -> Iterator[torch.Tensor]:
        q = self.quantization
        nested = (parts.get(k) for k in ("nested_absmax", "offset", NESTED_QUANT_MAP))
        absmax = scales(parts["absmax"], *nested)
        packed = parts[PACKED].detach().reshape(-1).view(torch.uint8)
        inn = shape[1]
        for start, stop in self.row_ranges(shape):
            codes = packed[start * inn // 2 : -(-stop * inn // 2)].reshape(-1, 1)
            scale = absmax[start * inn // q.blocksize : -(-stop * inn // q.blocksize)]
            rows = (stop - start, inn)
            yield dequantized(codes, scale, q.blocksize, q.quant_type, rows, torch.float32)

    def row_ranges(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Whole blocks each, but for the last."""
        return row_ranges(shape, self.quantization.blocksize)

    def tables(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The 16 values of the type."""
        kind = self.quantization.quant_type
        return {f"{QUANT_MAP}.{kind}": bnb.get_4bit_type(kind, device=str(device))}

    # -- state dicts ----------------------------------------------------------------------------------

    def to_state(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """bitsandbytes' own entries (``absmax``, ``quant_map``, ...); of a stack, for which it has no form, the parts."""
        if len(shape) == 3:
            return {k: v for k, v in parts.items() if k not in (PACKED, NESTED_QUANT_MAP)}
        entries: dict[str, torch.Tensor] = quant_state(
            parts, shape, dtype, self.quantization
        ).as_dict(packed=True)
        return entries

    def from_state(
        self,
        state: Mapping[str, torch.Tensor],
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> dict[str, torch.Tensor]:
        if len(shape) == 3:
            return dict(state)
        theirs = bnb.QuantState.from_dict(dict(state), device=parts[PACKED].device)
        ours = quant_state(parts, shape, dtype, self.quantization)
        mine, new = ((s.quant_type, s.blocksize, tuple(s.shape), s.nested) for s in (ours, theirs))
        if mine != new:
            raise CheckpointError(f"storage {new} does not fit {mine}")
        values = {"absmax": theirs.absmax}
        if theirs.nested:
            values |= {"nested_absmax": theirs.state2.absmax, "offset": theirs.offset}
        return values


class FourBitBuilder:
    """A ``Builder`` of 4-bit storage, byte for byte what ``bitsandbytes.functional.quantize_4bit`` makes of a whole matrix."""

    def __init__(
        self, scheme: FourBit, shape: tuple[int, ...], device: torch.device | str = "cpu"
    ) -> None:
        self.scheme = scheme
        self.blocks = -(-shape[-2] * shape[-1] // scheme.quantization.blocksize)
        self.stacked = len(shape) == 3
        self.matrices = shape[0] if self.stacked else 1
        self.finite = True
        self.parts = {
            name: torch.empty(part.shape, dtype=part.dtype, device=device)
            for name, part in scheme.parts(shape).items()
        }

    def add(self, index: int, pieces: Iterable[torch.Tensor]) -> None:
        held = self.scheme.matrix(self.parts, index) if self.stacked else self.parts
        matrix = MatrixQuantizer(held[PACKED], self.blocks, self.scheme.quantization)
        for piece in pieces:
            matrix.add(piece)
        self.finite &= matrix.finite
        for name, value in matrix.finish().items():
            held[name].copy_(value)


def quant_state(
    parts: Mapping[str, torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    quantization: Quantization,
) -> bnb.QuantState:
    """bitsandbytes' own description of stored parts of one matrix, for its functions and for checkpoints.

    Args:
        parts: what ``FourBit.quantize`` returned.
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
