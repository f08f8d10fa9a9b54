"""What computes a token that is generated: products with 4-bit storage, and attention over a cache, beside float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime import (
    cached_attention,
    cpu_kernels,
    few_rows,
    linear_4bit,
    linear_dense,
)
from qlora_fx.runtime.ops import ops
from qlora_fx.runtime.schemes.four_bit import FourBit
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

KEYS = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def product(q: Quantization, out: int, size: int, *, rank: int = 3, bias: bool = True) -> Any:
    """Arguments of the operator behind ``x``, and its definition in float64."""
    parts = FourBit(q).quantize(random(out, size, seed=1))
    dense = FourBit(q).dequantize(parts, (out, size), torch.float32).double()
    added = random(out, seed=2) if bias else None
    a, b = (random(rank, size, seed=3), random(out, rank, seed=4)) if rank else (None, None)
    storage = (parts.get(k) for k in KEYS)
    arguments = (*storage, added, a, b, 0.5, [out, size], q.blocksize, q.quant_type)

    def definition(x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x.double(), dense, None if added is None else added.double())
        return y if a is None or b is None else y + 0.5 * (x.double() @ a.double().T) @ b.double().T

    return arguments, definition


class Called(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


SETTINGS = {
    "QLoRA's": (Quantization(), 70, 96),
    "rows that fill no blocks": (Quantization(blocksize=128), 33, 96),
    "single": (Quantization(double_quant=False), 40, 64),
    "fp4": (Quantization(quant_type="fp4", blocksize=32), 40, 160),
    "large enough for threads": (Quantization(), 300, 512),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_of_few_rows_are_those_of_the_definition(setting: str) -> None:
    q, out, size = SETTINGS[setting]
    for rank, bias in ((3, True), (17, False), (0, True)):
        arguments, definition = product(q, out, size, rank=rank, bias=bias)
        for rows in (1, 2, 3, 7, 16, 17):
            x = random(rows, size)
            assert few_rows.are_few(x, size) is (rows <= 16)
            y, true = ops.linear_4bit(x, *arguments), definition(x)
            torch.testing.assert_close(
                y.double(), true, rtol=0, atol=2e-6 * float(true.abs().max())
            )


def test_other_dtypes_shapes_and_strides() -> None:
    arguments, definition = product(Quantization(), 70, 96)
    x = random(2, 96, 3).transpose(1, 2)
    torch.testing.assert_close(
        ops.linear_4bit(x, *arguments).double(), definition(x), rtol=0, atol=1e-4
    )
    low = random(2, 1, 96, dtype=torch.bfloat16)
    y = ops.linear_4bit(low, *arguments)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), definition(low), rtol=1e-2, atol=1e-1)
    arguments, definition = product(Quantization(), 70, 48)  # rows of no multiple of 32
    x = random(1, 48)
    assert not few_rows.takes_4bit(48, 64)
    torch.testing.assert_close(
        ops.linear_4bit(x, *arguments).double(), definition(x), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("out", "size", "rank"), [(70, 96, 3), (3, 16, 0), (300, 528, 17)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_with_a_dense_weight(out: int, size: int, rank: int, bias: bool) -> None:
    weight, added = random(out, size, seed=1), random(out, seed=2) if bias else None
    a, b = (random(rank, size, seed=3), random(out, rank, seed=4)) if rank else (None, None)
    for rows in (1, 2, 3, 7, 8, 16, 17):
        x = random(rows, 2, size)[:, 1]
        true = torch.nn.functional.linear(
            x.double(), weight.double(), None if added is None else added.double()
        )
        if a is not None and b is not None:
            true = true + 0.5 * (x.double() @ a.double().T) @ b.double().T
        y = ops.linear_dense(x, weight, added, a, b, 0.5)
        torch.testing.assert_close(y.double(), true, rtol=0, atol=2e-6 * float(true.abs().max()))
    leaves = [
        t.requires_grad_() for t in (random(2, 3, size), weight, added, a, b) if t is not None
    ]
    given = [leaves[0], weight, added, a, b]
    probe = random(2, 3, out, seed=5)
    found = torch.autograd.grad((ops.linear_dense(*given, 0.5) * probe).sum(), leaves)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in given]
    true = (linear_dense.by_pytorch(*wide, 0.5) * probe).sum()
    for mine, other in zip(
        found, torch.autograd.grad(true, [t for t in wide if t is not None]), strict=True
    ):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-4)


def test_what_the_kernels_do_not_take_goes_back() -> None:
    """Called past Python by compiled graphs, they send back more rows, and what is not contiguous."""
    kernels = few_rows.kernels()
    arguments, definition = product(Quantization(), 70, 96)
    x = random(17, 96)
    torch.testing.assert_close(
        kernels.linear_4bit(x, *arguments).double(), definition(x), rtol=0, atol=1e-4
    )
    (*storage, bias, a, _, scaling, shape, blocksize, kind) = arguments
    spread = a.T.contiguous().T, random(70, 6, seed=4)[:, ::2]
    assert not any(t.is_contiguous() for t in spread)
    y = kernels.linear_4bit(x[:2], *storage, bias, *spread, scaling, shape, blocksize, kind)
    plain = [t.contiguous() for t in spread]
    whole = kernels.linear_4bit(x[:2], *storage, bias, *plain, scaling, shape, blocksize, kind)
    torch.testing.assert_close(y, whole)
    weight = random(96, 70, seed=1).T
    for rows in (2, 17):
        y = kernels.linear_dense(x[:rows], weight, None, None, None, 0.0)
        torch.testing.assert_close(y, x[:rows] @ weight.T, rtol=0, atol=1e-4)


def test_rows_of_another_size_are_refused() -> None:
    """Not read behind their end, nor sent back and forth."""
    arguments, _ = product(Quantization(), 8, 64, rank=0)
    for x in (random(2, 32), random(17, 32)):
        with pytest.raises(RuntimeError):
            ops.linear_dense(x, random(5, 64), None, None, None, 0.0)
        with pytest.raises(RuntimeError):
            ops.linear_4bit(x, *arguments)
        with pytest.raises(RuntimeError):
            few_rows.kernels().linear_4bit(x, *arguments)


def test_gradients_are_those_of_the_definition() -> None:
    (*storage, bias, a, b, scaling, shape, blocksize, kind), _ = product(Quantization(), 40, 64)
    leaves = [t.requires_grad_() for t in (random(2, 3, 64), bias, a, b)]
    x, bias, a, b = leaves
    y = ops.linear_4bit(x, *storage, bias, a, b, scaling, shape, blocksize, kind)
    probe = random(2, 3, 40, seed=5)
    found = torch.autograd.grad((y * probe).sum(), leaves)
    dense = FourBit(Quantization()).dequantize(
        dict(zip(KEYS, storage, strict=True)), (40, 64), torch.float32
    )
    x, bias, a, b = (t.detach().double().requires_grad_() for t in leaves)
    y = torch.nn.functional.linear(x, dense.double(), bias) + scaling * (x @ a.T) @ b.T
    true = torch.autograd.grad((y * probe).sum(), (x, bias, a, b))
    for mine, other in zip(found, true, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-4)


def test_without_a_compiler_the_weight_is_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, definition = product(Quantization(), 70, 96)
    x = random(1, 96)
    monkeypatch.setattr(cpu_kernels, "compiled", lambda *_: None)
    torch.testing.assert_close(
        ops.linear_4bit(x, *arguments).double(), definition(x), rtol=0, atol=1e-4
    )
    weight = random(70, 96, seed=1)
    y = ops.linear_dense(x, weight, None, None, None, 0.0)
    torch.testing.assert_close(y, x @ weight.T, rtol=0, atol=1e-4)


def test_a_kernel_that_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", fails)
    with pytest.warns(UserWarning, match=r"few_rows.cpp cannot be compiled here.*no compiler\)$"):
        assert cpu_kernels.compiled.__wrapped__("few_rows.cpp") is None


@pytest.mark.parametrize(
    "setting", [s for s, (q, _, size) in SETTINGS.items() if size % q.blocksize == 0]
)
@pytest.mark.parametrize("bias", [True, False])
def test_bitsandbytes_product_is_given_what_it_takes(setting: str, bias: bool) -> None:
    """On a CPU its operator is another function of the same arguments."""
    q, out, size = SETTINGS[setting]
    (*storage, added, _, _, _, shape, blocksize, kind), definition = product(
        q, out, size, rank=0, bias=bias
    )
    x = random(3, size)
    y = linear_4bit.by_bitsandbytes(x, added, storage, shape, blocksize, kind)
    torch.testing.assert_close(y.double(), definition(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "rows", "double"), [(128, 1, True), (128, 3, False), (96, 1, True)]
)
def test_on_a_gpu_bitsandbytes_multiplies_rows_of_whole_blocks(
    size: int, rows: int, double: bool
) -> None:
    arguments, _ = product(Quantization(double_quant=double), 70, size)
    with FakeTensorMode(), Called() as called:
        x, *on_gpu = (
            torch.empty(t.shape, dtype=t.dtype, device="cuda:0") if isinstance(t, Tensor) else t
            for t in (random(rows, size), *arguments)
        )
        y = linear_4bit.linear_4bit(x, *on_gpu)
    assert (y.shape, y.device.type) == ((rows, 70), "cuda")
    products = {"gemm_4bit", "dequantize_4bit"} & called.names
    assert products == ({"gemm_4bit"} if size % 64 == 0 else {"dequantize_4bit"})


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_cpus_compute_the_same(capability: str) -> None:
    """Which instructions are compiled for is decided when PyTorch is imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "definition",
        ],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


# -- attention ---------------------------------------------------------------------------------------


def cached(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Six query heads that share two key heads, seven earlier tokens and three new ones, in two rows."""
    q, k, v = (
        random(2, 3, heads, size, seed=i, dtype=dtype).transpose(1, 2)
        for i, (heads, size) in enumerate(((6, 16), (2, 16), (2, 8)))
    )
    past_k, past_v = (
        random(7, 2, 2, size, seed=5 + i, dtype=dtype) for i, size in enumerate((16, 8))
    )
    return q, past_k, k, past_v, v


def masks() -> dict[str, Tensor]:
    causal = torch.ones(3, 10, dtype=torch.bool).tril(7)[None, None]
    padded = causal.expand(2, 1, 3, 10).clone()
    padded[1, ..., :4] = False
    return {
        "causal": causal,
        "padded": padded,
        "added": torch.where(padded, random(2, 1, 3, 10, seed=9), torch.tensor(-1e30)),
        "by head": padded.repeat(1, 6, 1, 1)
        & (random(2, 6, 3, 10, seed=9) > -1).logical_or(causal),
    }


@pytest.mark.parametrize("kind", masks())
def test_attention_over_a_cache_is_that_over_all_keys(kind: str) -> None:
    q, past_k, k, past_v, v = (t.requires_grad_() for t in cached())
    mask = masks()[kind]
    out = ops.cached_attention(q, past_k, k, past_v, v, mask, 0.3)
    wide = [t.detach().double().requires_grad_() for t in (q, past_k, k, past_v, v)]
    keys, values = (
        torch.cat([past.permute(1, 2, 0, 3), new], 2).repeat_interleave(3, 1)
        for past, new in (wide[1:3], wide[3:])
    )
    added = mask if mask.dtype == torch.bool else mask.double()
    true = torch.nn.functional.scaled_dot_product_attention(wide[0], keys, values, added, scale=0.3)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()
    probe = random(*out.shape, seed=8)
    found = torch.autograd.grad((out * probe).sum(), (q, past_k, k, past_v, v))
    expected = torch.autograd.grad((true * probe).sum(), wide)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "tokens", "earlier", "size", "value_size"),
    [
        ((6, 2), 3, 7, 16, 8),
        ((9, 3), 1, 513, 64, 64),
        ((4, 2), 1, 9, 16, 24),
        ((4, 4), 16, 40, 24, 40),
        ((8, 1), 2, 1, 80, 96),
    ],
)
def test_the_kernel_computes_what_the_definition_does(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    heads: tuple[int, int],
    tokens: int,
    earlier: int,
    size: int,
    value_size: int,
) -> None:
    many, few = heads
    total = earlier + tokens
    q, k, v = (
        random(2, tokens, *s, seed=i, dtype=dtype).transpose(1, 2)
        for i, s in enumerate(((many, size), (few, size), (few, value_size)))
    )
    past_k, past_v = (
        random(earlier, 2, few, s, seed=5 + i, dtype=dtype)
        for i, s in enumerate((size, value_size))
    )
    tensors = (q, past_k, k, past_v, v)
    seen = torch.ones(tokens, total, dtype=torch.bool).tril(earlier)
    padded = seen.expand(2, 1, tokens, total).clone()
    padded[1, ..., : earlier // 2] = False
    hidden = padded.clone()
    hidden[0, :, -1] = False
    given = (
        *(seen[None, None], padded, padded.repeat(1, many, 1, 1), hidden),
        torch.where(padded, random(2, many, tokens, total, seed=9), torch.tensor(-1e30)).to(dtype),
        random(1, 1, tokens, 1, seed=3).expand(2, many, tokens, total),
    )
    found = [cached_attention.by_kernel(*tensors, mask, 0.3) for mask in given]
    monkeypatch.setattr(cpu_kernels, "compiled", lambda *_: None)
    wide = [t.double() for t in tensors]
    for mine, mask in zip(found, given, strict=True):
        true = ops.cached_attention(*wide, mask if mask.dtype == torch.bool else mask.double(), 0.3)
        assert mine is not None
        assert mine.transpose(1, 2).is_contiguous()
        assert mine.dtype == dtype
        limit = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mine.double(), true, rtol=0, atol=limit)
    assert not found[3][0, :, -1].any()
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    mixed = (q, past_k.to(other), *tensors[2:])
    assert cached_attention.by_kernel(*mixed, seen[None, None], 0.3) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_many_tokens_behind_a_cache_are_as_few(dtype: torch.dtype) -> None:
    heads = ((6, 16), (2, 16), (2, 8))
    q, k, v = (random(2, 20, *s, seed=i).transpose(1, 2) for i, s in enumerate(heads))
    past = [random(7, 2, 2, size, seed=5 + i) for i, size in enumerate((16, 8))]
    seen = torch.ones(20, 27, dtype=torch.bool).tril(7)[None, None].expand(2, 1, 20, 27)
    mask = seen if dtype == torch.bool else torch.where(seen, 0.0, -1e30)
    whole = ops.cached_attention(q, past[0], k, past[1], v, mask, 0.3)
    for i in (0, 11, 19):  # token by token, behind all before it
        earlier = [
            torch.cat([p, t[:, :, :i].permute(2, 0, 1, 3)])
            for p, t in zip(past, (k, v), strict=True)
        ]
        at = (slice(None), slice(None), slice(i, i + 1))
        one = ops.cached_attention(
            q[at], earlier[0], k[at], earlier[1], v[at], mask[..., i : i + 1, : 8 + i], 0.3
        )
        torch.testing.assert_close(whole[at], one, rtol=0, atol=1e-5)
    assert whole.transpose(1, 2).is_contiguous()


def test_a_query_that_sees_nothing_gets_zeros_and_bfloat16_is_near() -> None:
    mask = masks()["causal"].clone()
    mask[:, :, 1] = False
    out = ops.cached_attention(*cached(), mask, 0.3)
    assert not out[:, :, 1].any()
    q, *rest = cached()
    q[0, 0, 0, 0] = float("nan")
    broken = ops.cached_attention(q, *rest, mask, 0.3)
    assert bool(torch.isnan(broken[0, 0, 0]).all()), "what is not a number is not hidden"
    assert bool(torch.isfinite(broken[0, 1:]).all())
    low = ops.cached_attention(*cached(torch.bfloat16), mask, 0.3)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), out, rtol=0, atol=3e-2)


def test_operators_pass_opcheck() -> None:
    arguments, _ = product(Quantization(), 40, 64)
    torch.library.opcheck(ops.linear_4bit.default, (random(2, 64).requires_grad_(), *arguments))
    dense = (random(2, 64).requires_grad_(), random(40, 64, seed=1), *arguments[5:9])
    torch.library.opcheck(ops.linear_dense.default, dense)
    q, *rest = cached()
    call = (q.requires_grad_(), *rest, masks()["padded"], 0.3)
    torch.library.opcheck(ops.cached_attention.default, call)
