"""Storage equals bitsandbytes' byte for byte, and has the size the paper says."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime.schemes.four_bit import dequantize_weight, layout, quantize_weight


def by_bitsandbytes(weight: torch.Tensor, q: Quantization) -> bnb.nn.Params4bit:
    """What ``bitsandbytes.nn.Linear4bit`` makes of the weight when it is moved to its device."""
    p = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        quant_type=q.quant_type,
        blocksize=q.blocksize,
        compress_statistics=q.double_quant,
        quant_storage=q.storage_dtype,
    )
    return p.to("cpu")


@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (1, 1), (17, 129), (300, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "q",
    [
        Quantization(),
        Quantization("fp4"),
        Quantization(double_quant=False),
        Quantization(blocksize=128),
    ],
    ids=str,
)
def test_storage_is_bitsandbytes_byte_for_byte(
    shape: tuple[int, int], dtype: torch.dtype, q: Quantization
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    ours, theirs = quantize_weight(weight, q), by_bitsandbytes(weight, q)
    state = theirs.quant_state
    assert torch.equal(ours["packed"], theirs.data)
    assert torch.equal(ours["absmax"], state.absmax)
    if q.double_quant:
        assert torch.equal(ours["nested_absmax"], state.state2.absmax)
        assert torch.equal(ours["nested_quant_map"], state.state2.code)
        assert torch.equal(ours["offset"], state.offset)
    # Asked for one long row: on CPUs with AVX-512 its values are wrong for rows that fill no whole blocks.
    state.shape = torch.Size((1, weight.numel()))
    dense = bnb.functional.dequantize_4bit(theirs.data, state)
    assert torch.equal(dequantize_weight(ours, shape, dtype, q), dense.view(shape))


@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (1, 1), (512, 513)])
@pytest.mark.parametrize("double", [True, False])
def test_layout_is_what_quantizing_gives(shape: tuple[int, int], double: bool) -> None:
    q = Quantization(double_quant=double)
    parts = quantize_weight(torch.randn(shape), q)
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == layout(shape, q)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32]
)
def test_packed_bytes_are_the_same_in_every_storage_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 48)
    q = Quantization(storage_dtype=dtype)
    parts = quantize_weight(weight, q)
    assert parts["packed"].dtype == dtype
    plain = quantize_weight(weight, Quantization())
    assert torch.equal(parts["packed"].view(torch.uint8).flatten(), plain["packed"].flatten())
    assert torch.equal(
        dequantize_weight(parts, (64, 48), torch.float32, q),
        dequantize_weight(plain, (64, 48), torch.float32, Quantization()),
    )


def test_bytes_that_do_not_fill_a_storage_element_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\[3, 3\] do not divide into torch.float32.*accepted:.*uint8"
    ):
        layout((3, 3), Quantization(storage_dtype=torch.float32))


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_per_weight(double: bool, bits: float) -> None:
    shape = (2048, 2048)
    parts = quantize_weight(torch.randn(shape), Quantization(double_quant=double))
    parts.pop("nested_quant_map", None)  # held once per model
    held = 8 * sum(t.nbytes for t in parts.values()) / (shape[0] * shape[1])
    assert held == pytest.approx(bits, abs=5e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(101, 48), (48, 80), (33, 96), (64, 96), (11, 7), (64, 128)])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_dequantized_values_follow_the_definition(
    quant_type: str, shape: tuple[int, int], blocksize: int
) -> None:
    """``code[nibble] * absmax[i // blocksize]``, computed here: rows need not fill whole blocks."""
    q = Quantization(quant_type=quant_type, blocksize=blocksize, double_quant=False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.linspace(0.1, 3, shape[0])[:, None]
    parts = quantize_weight(weight, q)
    i = torch.arange(weight.numel())
    byte = parts["packed"].view(-1)[i // 2].long()
    nibble = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    code = bnb.functional.get_4bit_type(quant_type, device="cpu")
    true = (code[nibble] * parts["absmax"][i // blocksize]).view(shape)
    assert torch.equal(dequantize_weight(parts, shape, torch.float32, q), true)
    assert (true - weight).norm() < 0.2 * weight.norm()
