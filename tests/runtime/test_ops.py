"""The grouped products: operator checks, values and gradients against float64, experts without rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime.ops import grouped_linear, grouped_linear_4bit, grouped_outer
from qlora_fx.runtime.schemes.four_bit import FourBit

ENDS = torch.tensor([2, 2, 7, 7])
"""Experts 1 and 3 get no rows; the last two of nine rows belong to nobody."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_loop(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = [x[:2] @ weight[0].T, x[2:7] @ weight[2].T, x[7:] @ torch.zeros_like(weight[0]).T]
    return torch.cat(rows)


def storage(double_quant: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Four experts of 5 x 7: 35 weights, which fill no block and no byte evenly."""
    q = Quantization(double_quant=double_quant)
    weight = random(4, 5, 7, seed=1)
    parts = FourBit(q).quantize(weight)
    keys = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")
    dense = FourBit(q).dequantize(parts, (4, 5, 7), dtype)
    return dense, tuple(parts.get(k) for k in keys), q


@pytest.mark.parametrize("double_quant", [True, False])
def test_operators_pass_opcheck(double_quant: bool) -> None:
    x = random(9, 7).requires_grad_()
    _, parts, q = storage(double_quant)
    torch.library.opcheck(grouped_linear, (x, random(4, 5, 7).requires_grad_(), ENDS))
    torch.library.opcheck(grouped_outer, (random(9, 5), random(9, 7), ENDS))
    arguments = (x, *parts, ENDS, [5, 7], q.blocksize, q.quant_type)
    torch.library.opcheck(grouped_linear_4bit, arguments)


def test_values_and_gradients_are_those_of_a_loop() -> None:
    x, weight = random(9, 7).double().requires_grad_(), random(4, 5, 7).double().requires_grad_()
    y = grouped_linear(x, weight, ENDS)
    true = by_loop(x, weight)
    torch.testing.assert_close(y, true)
    probe = random(9, 5, seed=3).double()
    got = torch.autograd.grad((y * probe).sum(), (x, weight))
    want = torch.autograd.grad((true * probe).sum(), (x, weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert not got[1][[1, 3]].any(), "experts without rows have no gradient"
    assert not y[7:].any(), "rows of nobody are zero"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_4bit_product_is_the_dense_one_on_dequantized_weights(
    double_quant: bool, dtype: torch.dtype
) -> None:
    weight, parts, q = storage(double_quant, dtype)
    x = random(9, 7).to(dtype).requires_grad_()
    y = grouped_linear_4bit(x, *parts, ENDS, [5, 7], q.blocksize, q.quant_type)
    assert torch.equal(y, grouped_linear(x, weight, ENDS))
    probe = random(9, 5, seed=3).to(dtype)
    (got,) = torch.autograd.grad((y * probe).sum(), x)
    (want,) = torch.autograd.grad((grouped_linear(x, weight, ENDS) * probe).sum(), x)
    assert torch.equal(got, want)


def test_each_expert_is_stored_as_bitsandbytes_stores_it_alone() -> None:
    scheme = FourBit(Quantization())
    weight = random(3, 5, 7)
    parts = scheme.quantize(weight)
    for i in range(3):
        alone = scheme.quantize(weight[i])
        for key, value in alone.items():
            assert torch.equal(value, parts[key] if key == "nested_quant_map" else parts[key][i])
    declared = {k: (part.shape, part.dtype) for k, part in scheme.parts((3, 5, 7)).items()}
    assert {k: (tuple(v.shape), v.dtype) for k, v in parts.items()} == declared
