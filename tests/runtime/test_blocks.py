"""Our 4-bit codes beside bitsandbytes' own, byte for byte."""

from __future__ import annotations

import itertools

import bitsandbytes.functional as bnb
import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime.schemes.blocks import PIECE, thresholds
from qlora_fx.runtime.schemes.four_bit import FourBit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def theirs(weight: torch.Tensor, q: Quantization) -> dict[str, torch.Tensor]:
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        blocksize=q.blocksize,
        compress_statistics=q.double_quant,
        quant_type=q.quant_type,
        quant_storage=q.storage_dtype,
    )
    parts = {"packed": packed, "absmax": state.absmax}
    if q.double_quant:
        parts |= {
            "nested_absmax": state.state2.absmax,
            "offset": state.offset,
            "nested_quant_map": state.state2.code,
        }
    return parts


def assert_same_bytes(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == other.keys()
    for name, part in ours.items():
        assert part.shape == other[name].shape, name
        assert part.dtype == other[name].dtype, name
        assert torch.equal(
            part.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)
        ), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_codes_are_bitsandbytes_codes_byte_for_byte(
    dtype: torch.dtype, kind: str, double: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    for shape, blocksize, storage in (
        ((48, 80), 64, torch.uint8),
        ((7, 33), 64, torch.uint8),  # neither rows nor the whole fill blocks, and an odd count
        ((64, 128), 32, torch.bfloat16),
        ((130, 4096), 4096, torch.uint8),
        ((700, 512), 64, torch.float32),  # more than one piece
    ):
        weight = torch.randn(shape, generator=generator).to(dtype) * 0.02
        q = Quantization(kind, blocksize, double, storage)
        assert_same_bytes(FourBit(q).quantize(weight), theirs(weight, q))
    assert PIECE < 700 * 512


def test_codes_agree_on_midpoints_and_their_neighbours() -> None:
    """A block whose absmax is 1 is not scaled: its values meet the midpoints exactly, and one ulp beside them."""
    for kind, scale in itertools.product(("nf4", "fp4"), (1.0, 0.5, 3.0, 1e-20, 1e20)):
        middle = torch.tensor(thresholds(kind)[0])
        infinity = torch.tensor(torch.inf)
        values = [middle, torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)]
        block = torch.cat([torch.ones(1), *values, torch.zeros(64 - 46)]) * scale
        weight = torch.stack([block, -block, block.flip(0)])
        q = Quantization(kind)
        assert_same_bytes(FourBit(q).quantize(weight), theirs(weight, q))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_agree_on_zeros_denormals_and_extremes(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    rows = [
        torch.zeros(64),
        -torch.zeros(64),
        torch.full((64,), info.max),
        torch.linspace(-1, 1, 64) * info.max,
        torch.linspace(-1, 1, 64) * info.tiny,
        torch.linspace(-1, 1, 64) * info.tiny / 8,  # denormal
        torch.cat([torch.tensor([info.max]), torch.full((63,), info.tiny)]),
        torch.cat([torch.zeros(63), torch.tensor([-info.smallest_normal])]),
    ]
    weight = torch.stack(rows).to(dtype)
    for kind in ("nf4", "fp4"):
        q = Quantization(kind, double_quant=False)
        assert_same_bytes(FourBit(q).quantize(weight), theirs(weight, q))


def test_a_transposed_weight_is_quantized_in_its_own_order() -> None:
    weight = torch.randn(90, 1100).t()
    assert not weight.is_contiguous()
    q = Quantization()
    assert_same_bytes(FourBit(q).quantize(weight), theirs(weight, q))


def test_experts_are_quantized_one_by_one() -> None:
    stack = torch.randn(3, 40, 70)
    q = Quantization()
    ours = FourBit(q).quantize(stack)
    for i, expert in enumerate(stack):
        one = {k: v if k == "nested_quant_map" else v[i] for k, v in ours.items()}
        assert_same_bytes(one, theirs(expert, q))


def test_pieces_of_whole_blocks_give_the_same_bytes_as_the_whole() -> None:
    weight = torch.randn(37, 75)
    q = Quantization(blocksize=32)
    builder = FourBit(q).builder((37, 75), "cpu")
    builder.add(0, torch.split(weight.reshape(-1), 96))
    assert_same_bytes(builder.parts, FourBit(q).quantize(weight))
    assert builder.finite


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_noticed(bad: float) -> None:
    weight = torch.ones(4, 64)
    weight[2, 5] = bad
    builder = FourBit(Quantization()).builder((4, 64), "cpu")
    builder.add(0, [weight.reshape(-1)])
    assert not builder.finite
