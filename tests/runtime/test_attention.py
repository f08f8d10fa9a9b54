"""Causal attention on CPUs: values and gradients against float64, for every kind of mask and size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_fx.runtime import attention as module
from qlora_fx.runtime.attention import ANY, CAUSAL, attention, compiled, library, mask_kind
from qlora_fx.testing.check import relative_error
from torch import Tensor

SIZES = [(2, 1), (1, 5), (2, 128), (1, 131), (1, 600)]
"""Batch and sequence: one token, within a tile, whole tiles, over their edge, more tiles than are held at a time."""
HEADS = [(16, 32), (80, 80), (8, 4)]
"""Sizes of keys and values; the last pair is PyTorch's kernel."""


def tensors(
    batch: int, rows: int, heads: tuple[int, int] = (16, 32), dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Six query heads that share two key heads."""
    generator = torch.Generator().manual_seed(rows)
    shapes = [(batch, rows, n, size) for n, size in ((6, heads[0]), (2, heads[0]), (2, heads[1]))]
    made = [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]
    return [t.requires_grad_() for t in made]


def masks(batch: int, rows: int) -> dict[str, Tensor]:
    causal = torch.ones(rows, rows, dtype=torch.bool).tril().expand(batch, 1, rows, rows)
    padded = torch.ones(batch, 1, 1, rows, dtype=torch.bool)
    padded[-1, ..., : rows // 3] = False  # on the left: the first queries see no key at all
    window = causal & torch.ones(rows, rows, dtype=torch.bool).triu(-3)
    return {"causal": causal, "padded": causal & padded, "window": window}


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    keys, values = (t.repeat_interleave(3, 1) for t in (k, v))
    scores = (q @ keys.transpose(2, 3)) * 0.3
    scores = scores.masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores, -1)
    result: Tensor = torch.where(mask.any(-1, keepdim=True), p, 0.0) @ values
    return result


def with_gradients(run: Any, inputs: list[Tensor]) -> list[Tensor]:
    out = run(*inputs)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad((out * probe).sum(), inputs)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["causal", "padded", "window", "none"])
@pytest.mark.parametrize(("batch", "rows"), SIZES)
def test_values_and_gradients_are_the_definitions(
    batch: int, rows: int, kind: str, heads: tuple[int, int]
) -> None:
    inputs = tensors(batch, rows, heads)
    given = None if kind == "none" else masks(batch, rows)[kind]
    seen = masks(batch, rows)["causal" if kind == "none" else kind]
    number = None if given is None else mask_kind(given)
    got = with_gradients(lambda q, k, v: attention(q, k, v, given, number, 0.3)[0], inputs)
    true_inputs = [t.detach().double().requires_grad_() for t in inputs]
    true = with_gradients(lambda q, k, v: by_definition(q, k, v, seen), true_inputs)
    for g, t in zip(got, true, strict=True):
        assert bool(torch.isfinite(g).all())
        torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=2e-5)


def test_a_mask_that_looks_ahead_is_honoured() -> None:
    inputs = tensors(2, 7)
    mask = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[..., 0] = True
    assert int(mask_kind(mask)) == ANY
    got = with_gradients(lambda q, k, v: attention(q, k, v, mask, mask_kind(mask), 0.3)[0], inputs)
    true = with_gradients(lambda q, k, v: by_definition(q, k, v, mask), inputs)
    for g, t in zip(got, true, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-4, atol=2e-5)


def test_the_kind_of_a_mask() -> None:
    for name, mask in masks(2, 9).items():
        assert int(mask_kind(mask)) == (CAUSAL if name == "causal" else ANY)
    assert int(mask_kind(torch.ones(1, 1, 4, 5, dtype=torch.bool))) == ANY
    assert int(mask_kind(torch.zeros(1, 1, 4, 4))) == ANY, "an additive mask may hold a bias"


def test_heads_with_masks_of_their_own_and_views_with_other_strides() -> None:
    inputs = [t.detach() for t in tensors(2, 70)]
    inputs = [t.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for t in inputs]
    causal = masks(2, 70)["causal"]
    mask = causal & (torch.rand(1, 6, 70, 70, generator=torch.Generator().manual_seed(0)) < 0.8)
    got = with_gradients(lambda q, k, v: attention(q, k, v, mask, None, 0.3)[0], inputs)
    true = with_gradients(lambda q, k, v: by_definition(q, k, v, mask), inputs)
    for g, t in zip(got, true, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    """Row 70 of the queries is NaN, for one head: its result and all keys' gradients are, the others are not."""
    inputs = tensors(1, 100, (16, 16), dtype)
    with torch.no_grad():
        inputs[0][0, 1, 70, 3] = float("nan")
    out, dq, dk, _ = with_gradients(lambda q, k, v: attention(q, k, v, None, None, 0.3)[0], inputs)
    assert bool(torch.isnan(out[0, 1, 70]).all())
    assert bool(torch.isfinite(out[0, 1, :70]).all())
    assert bool(torch.isfinite(out[0, 0]).all())
    assert bool(torch.isnan(dq[0, 1, 70]).all())
    assert bool(torch.isnan(dk[0, 0, :64]).all())


@pytest.mark.parametrize("capability", ["default", "avx2", None])
def test_every_kind_of_cpu_computes_the_same_and_uses_the_compiled_kernel_where_it_can(
    capability: str | None,
) -> None:
    """PyTorch's kernel gives the same numbers, three times slower: nothing else would notice that ours is left out.

    oneDNN's block products take float32 on every CPU, and bfloat16 where there are instructions for it.
    """
    script = Path(__file__).with_name("cpu_levels.py")
    env = os.environ | ({"ATEN_CPU_CAPABILITY": capability} if capability else {})
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, check=True, env=env
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 5, done.stderr
    has_low = torch.cpu._is_avx512_bf16_supported()
    for line in found:
        wide, low = line["torch.float32"], line["torch.bfloat16"]
        assert max(wide["errors"]) < 1e-5, line
        assert max(low["errors"]) < 1e-2, line
        if not torch.backends.mkldnn.is_available():
            continue
        assert wide["compiled"], line
        capped = line["level"] in ("SSE41", "AVX2", "AVX512_CORE")
        assert low["compiled"] is (has_low and not capped), line
        if capability:
            assert line["capability"] == capability.upper()


def test_the_compiled_kernel_runs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = tensors(1, 5)
    out, lse = (t.detach() for t in attention(q, k, v, None, None, 0.3))
    results = {"out": torch.zeros_like(out), "lse": torch.zeros_like(lse)}
    if library() is not None and compiled("forward", q, k, v, None, 0.3, **results):
        torch.testing.assert_close(results["out"], out, rtol=0, atol=0)
    assert not compiled("forward", q.half(), k.half(), v.half(), None, 0.3, **results)
    assert not compiled("forward", *(t[..., :8] for t in (q, k, v)), None, 0.3, **results)
    # Without oneDNN there are no such products; PyTorch's kernel gives the same.
    low = tensors(1, 70, (32, 32), torch.bfloat16)
    usual = attention(*low, None, None, 0.3)
    torch._C._set_mkldnn_enabled(False)
    try:
        without = attention(*low, None, None, 0.3)
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(module, "library", lambda: None)
    uncompiled = attention(*low, None, None, 0.3)
    for one, two, three in zip(usual, without, uncompiled, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(one, three, rtol=2e-2, atol=2e-2)


def test_bfloat16_is_about_as_good_as_pytorchs_kernel() -> None:
    inputs = tensors(2, 200, (32, 32), torch.bfloat16)
    mask = masks(2, 200)["causal"]

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (t.repeat_interleave(3, 1) for t in (k, v))
        result: Tensor = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, mask, scale=0.3
        )
        return result

    mine = with_gradients(lambda q, k, v: attention(q, k, v, mask, mask_kind(mask), 0.3)[0], inputs)
    other = with_gradients(theirs, inputs)
    true_inputs = [t.detach().double().requires_grad_() for t in inputs]
    true = with_gradients(lambda q, k, v: by_definition(q, k, v, mask), true_inputs)
    # Its kernel rounds probabilities before it normalizes them, ours after.
    for m, o, t in zip(mine, other, true, strict=True):
        assert relative_error(m, t) < 1.5 * relative_error(o, t)


def test_the_operators_pass_opcheck() -> None:
    q, k, v = tensors(2, 9)
    for mask in (masks(2, 9)["padded"], None):
        kind = None if mask is None else mask_kind(mask)
        torch.library.opcheck(attention, (q, k, v, mask, kind, 0.3))
    torch.library.opcheck(mask_kind, (masks(2, 9)["padded"],))
