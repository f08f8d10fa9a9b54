"""The nodes that read runtime/schemes/four_bit.py's parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...config import Quantization
from ...runtime.ops import NESTED_BLOCKSIZE, whole_rows
from ...runtime.schemes.four_bit import NESTED_QUANT_MAP, QUANT_MAP, FourBit
from ..graph.nodes import Emitter, StoredInputs, aten, ops
from ..graph.values import fake_empty
from .emission import Emission, Parts

bnb = torch.ops.bitsandbytes


class FourBitEmission(Emission):
    """``bitsandbytes::dequantize_4bit``, and operators of ours that read 4-bit storage whole."""

    format = "4bit"

    def __init__(self, quantization: Quantization) -> None:
        self.quantization = quantization
        self.scheme = FourBit(quantization)

    def dense(self, parts: Parts, shape: list[int], dtype: torch.dtype, then: Emitter) -> fx.Node:
        q = self.quantization
        absmax = parts["absmax"]
        if q.double_quant:
            nested = (parts["nested_absmax"], parts[NESTED_QUANT_MAP], NESTED_BLOCKSIZE)
            absmax = then(
                bnb.dequantize_blockwise.default, absmax, *nested, torch.float32, suffix="absmax"
            )
            absmax = then(aten.add.Tensor, absmax, parts["offset"], suffix="absmax_offset")
        rows = whole_rows(shape, q.blocksize)
        options = (q.blocksize, q.quant_type, rows, dtype)
        weight = then(
            bnb.dequantize_4bit.default, parts["packed"], absmax, *options, suffix="dequant"
        )
        if rows != shape:
            weight = then(aten.view.default, weight, shape, suffix="dequant_matrix")
        return weight

    def grouped(
        self, x: fx.Node, parts: Parts, ends: fx.Node, shape: list[int], then: Emitter
    ) -> tuple[Any, tuple[Any, ...]]:
        q = self.quantization
        nested = [parts.get(k) for k in ("nested_absmax", "offset", NESTED_QUANT_MAP)]
        storage = (parts["packed"], parts["absmax"], *nested)
        options = (shape, q.blocksize, q.quant_type)
        return ops.grouped_linear_4bit.default, (x, *storage, ends, *options)

    def product(
        self, x: Any, parts: Parts, bias: Any, lora: tuple[Any, Any, float], shape: list[int]
    ) -> tuple[Any, tuple[Any, ...]] | None:
        q = self.quantization
        nested = [parts.get(k) for k in ("nested_absmax", "offset", NESTED_QUANT_MAP)]
        storage = (parts["packed"], parts["absmax"], *nested)
        return ops.linear_4bit.default, (x, *storage, bias, *lora, shape, q.blocksize, q.quant_type)

    def head(self, parts: Parts) -> tuple[list[fx.Node], int, str]:
        return [*parts.values()], self.quantization.blocksize, self.quantization.quant_type

    def rows(
        self, ids: fx.Node, parts: Parts, size: int, inputs: StoredInputs, then: Emitter
    ) -> fx.Node:
        """Dequantize only the rows of an embedding that are looked up.

        Element ``j`` of row ``i`` is number ``n = i * size + j`` of the table: half a byte of ``packed``, scaled
        by ``absmax[n // blocksize]``. Gathered element by element this needs no rows that fill whole blocks, and
        it is one fused kernel when compiled. The values are bitwise those of ``dequantize_4bit``.
        """
        q = self.quantization
        device = then.like.meta["val"].device
        values = fake_empty(then.graph, [16], torch.float32, device)
        quant_map = inputs.add(f"{QUANT_MAP}.{q.quant_type}", values)

        integers = {"dtype": torch.int64, "device": device}
        columns = then(aten.arange.default, size, suffix="columns", **integers)
        number = then(aten.mul.Tensor, ids, size, suffix="row")
        number = then(aten.unsqueeze.default, number, -1, suffix="row_column")
        number = then(aten.add.Tensor, number, columns, suffix="number")
        packed = parts["packed"]
        if q.storage_dtype != torch.uint8:
            packed = then(aten.view.dtype, packed, torch.uint8, suffix="bytes")
        packed = then(aten.reshape.default, packed, [-1], suffix="packed")
        place = then(aten.bitwise_right_shift.Tensor_Scalar, number, 1, suffix="place")
        byte = then(aten.index.Tensor, packed, [place], suffix="byte")
        byte = then(aten._to_copy.default, byte, suffix="wide", dtype=torch.int64)
        odd = then(aten.bitwise_and.Scalar, number, 1, suffix="odd")
        shift = then(aten.mul.Tensor, odd, 4, suffix="odd_bits")
        shift = then(aten.rsub.Scalar, shift, 4, suffix="shift")
        nibble = then(aten.bitwise_right_shift.Tensor, byte, shift, suffix="shifted")
        nibble = then(aten.bitwise_and.Scalar, nibble, 15, suffix="nibble")
        value = then(aten.index.Tensor, quant_map, [nibble], suffix="value")
        block = then(
            aten.div.Tensor_mode, number, q.blocksize, suffix="block", rounding_mode="floor"
        )
        scale = then(aten.index.Tensor, parts["absmax"], [block], suffix="absmax")
        if q.double_quant:
            level = then(aten._to_copy.default, scale, suffix="level", dtype=torch.int64)
            scale = then(aten.index.Tensor, parts[NESTED_QUANT_MAP], [level], suffix="scale")
            outer = then(
                aten.div.Tensor_mode,
                block,
                NESTED_BLOCKSIZE,
                suffix="nested_block",
                rounding_mode="floor",
            )
            outer = then(aten.index.Tensor, parts["nested_absmax"], [outer], suffix="nested")
            scale = then(aten.mul.Tensor, scale, outer, suffix="scale_nested")
            scale = then(aten.add.Tensor, scale, parts["offset"], suffix="scale_offset")
        return then(aten.mul.Tensor, value, scale, suffix="rows")
