"""Storage equals bitsandbytes' byte for byte, and has the size the paper says."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime.schemes import scheme_of
from qlora_fx.runtime.schemes.four_bit import FourBit


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
    ours, theirs = FourBit(q).quantize(weight), by_bitsandbytes(weight, q)
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
    assert torch.equal(FourBit(q).dequantize(ours, shape, dtype), dense.view(shape))


SETTINGS = (Quantization(), Quantization(double_quant=False))
"""Each scheme's, for what all schemes must do."""


@pytest.mark.parametrize("shape", [(64, 48), (33, 7), (1, 1), (512, 513)])
@pytest.mark.parametrize("q", SETTINGS, ids=str)
def test_the_parts_are_what_quantizing_gives(shape: tuple[int, int], q: Quantization) -> None:
    scheme = scheme_of(q)
    parts = scheme.quantize(torch.randn(shape))
    declared = {k: (part.shape, part.dtype) for k, part in scheme.parts(shape).items()}
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == declared
    assert list(parts) == list(declared)


@pytest.mark.parametrize("q", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(33, 7), (512, 513), (1100, 768)])
def test_rows_are_the_dequantized_weight(shape: tuple[int, int], q: Quantization) -> None:
    scheme = scheme_of(q)
    parts = scheme.quantize(torch.randn(shape))
    rows = list(scheme.rows(parts, shape))
    assert torch.equal(torch.cat(rows), scheme.dequantize(parts, shape, torch.float32))
    assert [len(r) for r in rows] == [stop - start for start, stop in scheme.row_ranges(shape)]


@pytest.mark.parametrize("q", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(33, 7), (3, 5, 7)])
def test_a_state_dict_gives_the_parts_back(shape: tuple[int, ...], q: Quantization) -> None:
    scheme = scheme_of(q)
    parts = scheme.quantize(torch.randn(shape))
    state = scheme.to_state(parts, shape, torch.float32)
    back = scheme.from_state(state, parts, shape, torch.float32)
    own = {k for k, part in scheme.parts(shape).items() if not part.shared} - {"packed"}
    assert back.keys() == own
    for name in own:
        assert torch.equal(back[name], parts[name]), name


@pytest.mark.parametrize("q", SETTINGS, ids=str)
def test_the_storage_of_a_stack_is_that_of_its_matrices(q: Quantization) -> None:
    scheme = scheme_of(q)
    parts = scheme.quantize(torch.randn(3, 5, 7))
    each = [scheme.matrix(parts, i) for i in range(3)]
    again = scheme.stack(each)
    assert again.keys() == parts.keys()
    assert all(torch.equal(again[k], parts[k]) for k in parts)
    dense = torch.stack([scheme.dequantize(one, (5, 7), torch.float32) for one in each])
    assert torch.equal(scheme.dequantize(parts, (3, 5, 7), torch.float32), dense)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32]
)
def test_packed_bytes_are_the_same_in_every_storage_dtype(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 48)
    q = Quantization(storage_dtype=dtype)
    parts = FourBit(q).quantize(weight)
    assert parts["packed"].dtype == dtype
    plain = FourBit(Quantization()).quantize(weight)
    assert torch.equal(parts["packed"].view(torch.uint8).flatten(), plain["packed"].flatten())
    assert torch.equal(
        FourBit(q).dequantize(parts, (64, 48), torch.float32),
        FourBit(Quantization()).dequantize(plain, (64, 48), torch.float32),
    )


def test_bytes_that_do_not_fill_a_storage_element_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"\[3, 3\] do not divide into torch.float32.*accepted:.*uint8"
    ):
        FourBit(Quantization(storage_dtype=torch.float32)).parts((3, 3))


@pytest.mark.parametrize(("double", "bits"), [(True, 4.127), (False, 4.5)])
def test_bits_per_weight(double: bool, bits: float) -> None:
    shape = (2048, 2048)
    scheme = FourBit(Quantization(double_quant=double))
    parts = scheme.quantize(torch.randn(shape))
    parts.pop("nested_quant_map", None)  # held once per model
    held = 8 * sum(t.nbytes for t in parts.values()) / (shape[0] * shape[1])
    own = [part for part in scheme.parts(shape).values() if not part.shared]
    assert sum(part.nbytes for part in own) == sum(t.nbytes for t in parts.values())
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
    parts = FourBit(q).quantize(weight)
    i = torch.arange(weight.numel())
    byte = parts["packed"].view(-1)[i // 2].long()
    nibble = torch.where(i % 2 == 0, byte >> 4, byte & 15)
    code = bnb.functional.get_4bit_type(quant_type, device="cpu")
    true = (code[nibble] * parts["absmax"][i // blocksize]).view(shape)
    assert torch.equal(FourBit(q).dequantize(parts, shape, torch.float32), true)
    assert (true - weight).norm() < 0.2 * weight.norm()
