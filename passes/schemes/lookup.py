"""The part of quantize that rewrites an embedding."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...runtime.ops import NESTED_BLOCKSIZE
from ...runtime.schemes.four_bit import QUANT_MAP
from ..graph.nodes import Emitter, StoredInputs, aten, fake_mode
from ..graph.site import Site
from .stored import cast, stored_parts


def quantize_lookup(graph: fx.Graph, node: fx.Node, inputs: StoredInputs, config: Any) -> None:
    """Dequantize only the rows of an embedding that are looked up.

    Element ``j`` of row ``i`` is number ``n = i * dim + j`` of the table: half a byte of ``packed``, scaled by
    ``absmax[n // blocksize]``. Gathered element by element this needs no rows that fill whole blocks, and it
    is one fused kernel when compiled. The values are bitwise those of ``dequantize_4bit``.

    Before::

        %embed: f32[B, S, 48] = aten.embedding(%embed_weight, %input_ids)

    After (abridged)::

        %embed_nibble: i64[B, S, 48] = ...      # from %embed_weight_packed
        %embed_value: f32[B, S, 48] = aten.index(%quant_map, [%embed_nibble])
        %embed: f32[B, S, 48] = aten.mul(%embed_value, %embed_scale)
    """
    site: Site = node.meta["site"]
    q = config.quantization
    dim = site.in_features
    ids: Any = node.args[1]
    device = node.meta["val"].device
    with graph.inserting_before(node):
        parts = stored_parts(graph, node, site, inputs, config)
        with fake_mode(graph):
            values = torch.empty(16, dtype=torch.float32, device=device)
        quant_map = inputs.add(f"{QUANT_MAP}.{q.quant_type}", values)

        then = Emitter(graph, node)
        integers = {"dtype": torch.int64, "device": device}
        columns = then(aten.arange.default, dim, suffix="columns", **integers)
        number = then(aten.mul.Tensor, ids, dim, suffix="row")
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
            scale = then(aten.index.Tensor, parts["nested_quant_map"], [level], suffix="scale")
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
        rows = then(aten.mul.Tensor, value, scale, suffix="rows")
        # Rounded to the dtype in which the table was stored, as a dense table would have been.
        rows = cast(graph, rows, config.compute_dtype, f"{node.name}_rounded", like=node)
        result = cast(graph, rows, node.meta["val"].dtype, f"{node.name}_lookup", like=node)
    result.meta["site"] = site
    node.replace_all_uses_with(result)
    graph.erase_node(node)
