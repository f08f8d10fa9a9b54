"""The operators' kernels for GPUs beside their definitions in float64."""

from __future__ import annotations

from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime import attention as _attention  # noqa: F401 (registers the operators)
from qlora_fx.runtime import linear_4bit as _linear_4bit  # noqa: F401
from qlora_fx.runtime.attention_kernels import Inputs, kernel_for
from qlora_fx.runtime.attention_kernels.kernel import Mask
from qlora_fx.runtime.loss import linear_cross_entropy
from qlora_fx.runtime.ops import grouped_linear, grouped_linear_4bit
from qlora_fx.runtime.schemes.four_bit import FourBit
from qlora_fx.testing import relative_error
from torch import Tensor

ops: Any = torch.ops.qlora_fx
KEYS = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")
LIMIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


def gradients(value: Tensor, grad: Tensor, *wanted: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, wanted, grad.to(value.dtype)))


# -- attention -------------------------------------------------------------------------------------


MASKS = ("none", "causal", "left", "right", "window", "both", "pictures", "packed", "all", "holes")


def masks(name: str, rows: int) -> Tensor | None:
    """``[3, 1, rows, rows]``, or None where the operator is asked for a causal one."""
    causal = torch.ones(rows, rows, dtype=torch.bool, device="cuda").tril().expand(3, 1, rows, rows)
    keys = torch.arange(rows, device="cuda")
    padded = torch.tensor([0, 3, rows - 2], device="cuda")[:, None, None, None]
    if name == "none":
        return None
    if name == "left":  # the first queries see no key
        return causal & (keys >= padded)
    if name == "right":
        return causal & (keys < rows - padded)
    if name == "window":
        return causal & (keys > keys[:, None] - 5)
    if name == "both":
        return causal & (keys >= 3) & (keys < rows - padded[:2].sum())
    number = (keys >= 4).long() + (keys >= rows - 6)
    together = number[:, None] == number
    if name == "pictures":
        return together.expand(3, 1, rows, rows)
    if name == "packed":
        return causal & together
    if name == "all":  # an encoder's
        return (keys < rows - padded).expand(3, 1, rows, rows)
    if name == "holes":
        return causal & (keys % 3 != 1)
    assert name == "causal"
    return causal


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The definition; a query that sees no key gives zeros."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    rows = q.shape[2]
    seen = (
        torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril() if mask is None else mask
    )
    scores = (scale * q @ k.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    p = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    return p @ v


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("rows", "size", "value_size"),
    [(13, 16, 16), (21, 64, 64), (100, 128, 128), (128, 72, 72), (64, 20, 20), (33, 96, 64)],
)
def test_attention(dtype: torch.dtype, name: str, rows: int, size: int, value_size: int) -> None:
    shapes = ((3, 4, rows, size), (3, 2, rows, size), (3, 2, rows, value_size))
    q, k, v = (
        # as a model makes them: [batch, sequence, heads * size], viewed and transposed
        random(s[0], s[2], s[1], s[3], dtype=dtype, seed=i).transpose(1, 2)
        for i, s in enumerate(shapes)
    )
    mask, scale = masks(name, rows), size**-0.5
    looked_at = (None, None) if mask is None else ops.mask_sequences(mask)
    grad = random(3, 4, rows, value_size, seed=7, dtype=dtype)
    true = [t.double().requires_grad_() for t in (q, k, v)]
    expected = attend(*true, mask, scale)
    mine = [t.requires_grad_() for t in (q, k, v)]
    out, lse = ops.attention(*mine, mask, looked_at[0], scale, looked_at[1])
    assert lse.dtype == torch.float32
    assert lse.shape == (3, 4, rows)
    fake = torch.empty(3, rows, 4, value_size, device="cuda", dtype=dtype).transpose(1, 2)
    assert out.stride() == fake.stride()
    assert relative_error(out, expected) < LIMIT[dtype]
    found = gradients(out, grad, *mine)
    for mine_, true_ in zip(found, gradients(expected, grad, *true), strict=True):
        assert mine_.is_contiguous()
        assert relative_error(mine_, true_) < 2 * LIMIT[dtype]


@pytest.mark.parametrize("name", MASKS)
def test_which_kernel_computes(name: str) -> None:
    q, k, v = (random(3, n, 64, 64, dtype=torch.bfloat16) for n in (4, 2, 2))
    mask = masks(name, 64)
    told = (None, None) if mask is None else ops.mask_sequences(mask)
    expected = {"none": "flash", "causal": "flash", "holes": "efficient"}.get(name, "varlen")
    assert kernel_for(Inputs(q, k, v, Mask.of(mask, *told), 0.1)).name == expected
    full = Inputs(q.float(), k.float(), v.float(), Mask.of(mask, *told), 0.1)
    assert kernel_for(full).name == "efficient"


# -- loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [101, 5000, 32768])
@pytest.mark.parametrize(("scale", "softcap", "bias"), [(1.0, 0.0, False), (2.0, 3.0, True)])
@pytest.mark.parametrize("stored", ["dense", "nf4"])
def test_loss(
    dtype: torch.dtype, vocabulary: int, scale: float, softcap: float, bias: bool, stored: str
) -> None:
    rows, size = 70, 64
    x = random(rows, size, dtype=dtype).requires_grad_()
    weight, kind = [random(vocabulary, size, dtype=dtype, seed=1)], ""
    dense = weight[0]
    if stored == "nf4":
        q = Quantization()
        parts = FourBit(q).quantize(dense.float())
        keys = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")
        weight, kind = [parts[k] for k in keys], "nf4"
        dense = FourBit(q).dequantize(parts, (vocabulary, size), dtype)
    added = random(vocabulary, seed=2, dtype=dtype) if bias else None
    labels = torch.randint(0, vocabulary, (rows,), device="cuda")
    labels[[0, 5, 69]] = -100
    shape = [vocabulary, size]
    total, count, _ = linear_cross_entropy(
        x, weight, added, labels, -100, scale, softcap, shape, 64, kind, True
    )
    (grad,) = torch.autograd.grad(total, x)
    true = x.detach().double().requires_grad_()
    logits = true @ dense.double().T
    if added is not None:
        logits = logits + added.double()
    logits = logits * scale
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    (true_grad,) = torch.autograd.grad(expected, true)
    assert float(count) == rows - 3
    assert relative_error(total, expected) < LIMIT[dtype]
    assert relative_error(grad, true_grad) < 2 * LIMIT[dtype]


# -- experts ---------------------------------------------------------------------------------------

ENDS = ([5, 5, 21, 40], [0, 40, 40, 40], [7, 9, 20, 33])
"""Groups without rows, one with all, and rows behind the last."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(("inn", "out"), [(64, 96), (96, 8), (8, 64), (48, 20)])
def test_grouped_products(dtype: torch.dtype, ends: list[int], inn: int, out: int) -> None:
    x = random(40, inn, dtype=dtype).requires_grad_()
    weight = random(4, out, inn, dtype=dtype, seed=1).requires_grad_()
    y = grouped_linear(x, weight, torch.tensor(ends, device="cuda"))
    grad = random(40, out, dtype=dtype, seed=2)
    dx, dw = gradients(y, grad, x, weight)
    tx, tw = (t.detach().double().requires_grad_() for t in (x, weight))
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    rows = [tx[s:e] @ tw[i].T for i, (s, e) in enumerate(bounds)]
    true = torch.cat([*rows, torch.zeros(40 - ends[-1], out, device="cuda", dtype=torch.float64)])
    assert relative_error(y, true) < LIMIT[dtype]
    for mine, expected in zip((dx, dw), gradients(true, grad, tx, tw), strict=True):
        assert relative_error(mine, expected) < LIMIT[dtype]
    assert not y[ends[-1] :].any()
    assert not dx[ends[-1] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("inn", "out"), [(64, 96), (512, 256), (48, 24)])
def test_grouped_products_with_stored_weights(
    dtype: torch.dtype, double: bool, inn: int, out: int
) -> None:
    q = Quantization(double_quant=double)
    parts = FourBit(q).quantize(random(4, out, inn, seed=1))
    dense = FourBit(q).dequantize(parts, (4, out, inn), torch.float32).double()
    x = random(40, inn, dtype=dtype).requires_grad_()
    ends = ENDS[2]
    stored = [parts.get(k) for k in KEYS]
    at = torch.tensor(ends, device="cuda")
    y = grouped_linear_4bit(x, *stored, at, [out, inn], 64, "nf4")
    grad = random(40, out, dtype=dtype, seed=2)
    (dx,) = gradients(y, grad, x)
    true = torch.zeros(40, out, dtype=torch.float64, device="cuda")
    true_dx = torch.zeros(40, inn, dtype=torch.float64, device="cuda")
    for i, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        true[start:stop] = x[start:stop].detach().double() @ dense[i].T
        true_dx[start:stop] = grad[start:stop].double() @ dense[i]
    assert relative_error(y, true) < LIMIT[dtype]
    assert relative_error(dx, true_dx) < LIMIT[dtype]


# -- generated tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 5, 16, 700])
@pytest.mark.parametrize(("inn", "out"), [(512, 264), (48, 24)])
def test_products_of_few_rows(
    dtype: torch.dtype, double: bool, rows: int, inn: int, out: int
) -> None:
    q = Quantization(double_quant=double)
    parts = FourBit(q).quantize(random(out, inn, seed=1))
    stored = [parts.get(k) for k in KEYS]
    weight = FourBit(q).dequantize(parts, (out, inn), torch.float32).double()
    x, bias = random(rows, 1, inn, dtype=dtype), random(out, dtype=dtype, seed=2)
    a, b = random(3, inn, seed=3), random(out, 3, seed=4)
    y = ops.linear_4bit(x, *stored, bias, a, b, 0.5, [out, inn], 64, "nf4")
    wide = x.double()
    true = torch.nn.functional.linear(wide, weight, bias.double())
    true = true + 0.5 * (wide @ a.double().T) @ b.double().T
    assert y.dtype == dtype
    assert relative_error(y, true) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_attention_over_a_cache(dtype: torch.dtype, tokens: int) -> None:
    q, k, v = (
        random(2, tokens, *s, dtype=dtype, seed=i).transpose(1, 2)
        for i, s in enumerate(((6, 16), (2, 16), (2, 8)))
    )
    past = [random(9, 2, 2, size, dtype=dtype, seed=5 + i) for i, size in enumerate((16, 8))]
    total = 9 + tokens
    seen = torch.ones(tokens, total, dtype=torch.bool, device="cuda").tril(9)
    seen = seen.expand(2, 1, tokens, total)
    out = ops.cached_attention(q, past[0], k, past[1], v, seen, 0.25)
    keys, values = (
        torch.cat([p.permute(1, 2, 0, 3), t], 2).double() for p, t in zip(past, (k, v), strict=True)
    )
    true = attend(q.double(), keys, values, seen, 0.25)
    assert relative_error(out, true) < LIMIT[dtype]


# -- storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 128), (96, 80), (7, 48), (33, 17)])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_storage_is_bitsandbytes(shape: tuple[int, int], kind: str, double: bool) -> None:
    weight = random(*shape)
    q = Quantization(quant_type=kind, double_quant=double)
    parts = FourBit(q).quantize(weight)
    packed, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    assert torch.equal(parts["packed"].flatten(), packed.flatten())
    mine = FourBit(q).dequantize(parts, shape, torch.float32)
    torch.testing.assert_close(mine, bnb.dequantize_4bit(packed, state), rtol=0, atol=1e-6)
    if weight.numel() % 64:
        return  # bitsandbytes compiles that for a CPU with torch.compile, which takes a minute
    on_cpu = FourBit(q).dequantize({k: v.cpu() for k, v in parts.items()}, shape, torch.float32)
    torch.testing.assert_close(mine.cpu(), on_cpu, rtol=1e-5, atol=1e-6)
