"""Attention on CPUs: values and gradients against float64, for every kind of mask and size, by the kernel that should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from qlora_fx.errors import GraphError
from qlora_fx.runtime import attention_kernels
from qlora_fx.runtime.attention import attention, mask_kind
from qlora_fx.runtime.attention_kernels import (
    ANY,
    CAUSAL,
    KERNELS,
    Inputs,
    Kernel,
    Mask,
    MaskKind,
    onednn,
)
from qlora_fx.runtime.attention_kernels.onednn import OneDnn
from qlora_fx.runtime.attention_kernels.pytorch import PyTorch
from qlora_fx.testing.reference import relative_error
from torch import Tensor

SIZES = [(2, 1), (1, 5), (2, 128), (1, 131), (1, 600)]
"""Batch and sequence: one token, within a tile, whole tiles, over their edge, more tiles than are held at a time."""
HEADS = [(16, 32), (80, 80), (8, 4)]
"""Sizes of keys and values; the last pair is PyTorch's kernel."""
CAUSAL_MASK = Mask.of(None, None)


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


ON_CPU = tuple(kernel for kernel in KERNELS if kernel.device == "cpu")


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    keys, values = (t.repeat_interleave(3, 1) for t in (k, v))
    scores = (q @ keys.transpose(2, 3)) * 0.3
    scores = scores.masked_fill(~mask, float("-inf"))
    p = torch.softmax(scores, -1)
    result: Tensor = torch.where(mask.any(-1, keepdim=True), p, 0.0) @ values
    return result


def start_with(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the kernels that are asked before this one."""
    monkeypatch.setattr(attention_kernels, "KERNELS", ON_CPU[ON_CPU.index(kernel) :])


def with_gradients(run: Any, inputs: list[Tensor]) -> list[Tensor]:
    out = run(*inputs)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad((out * probe).sum(), inputs)]


@pytest.mark.parametrize("first", ON_CPU, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", ["causal", "padded", "window", "none"])
@pytest.mark.parametrize(("batch", "rows"), SIZES)
def test_values_and_gradients_are_the_definitions(
    batch: int,
    rows: int,
    kind: str,
    heads: tuple[int, int],
    first: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_with(first, monkeypatch)
    inputs = tensors(batch, rows, heads)
    mask = None if kind == "none" else masks(batch, rows)[kind]
    seen = masks(batch, rows)["causal" if kind == "none" else kind]
    code = None if mask is None else mask_kind(mask)
    got = with_gradients(lambda q, k, v: attention(q, k, v, mask, code, 0.3)[0], inputs)
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
        assert int(mask_kind(mask)) == (CAUSAL.code if name == "causal" else ANY)
    assert int(mask_kind(torch.ones(1, 1, 4, 5, dtype=torch.bool))) == ANY
    for rows, columns in ((4, 5), (5, 4)):
        mask = torch.ones(1, 1, rows, columns, dtype=torch.bool).tril()
        assert int(mask_kind(mask)) == ANY, "queries and keys do not begin together"
    assert int(mask_kind(torch.zeros(1, 1, 4, 4))) == ANY, "an additive mask may hold a bias"


def test_a_causal_mask_is_not_read() -> None:
    """The same numbers either way: only that it is handed on as None lets a kernel skip its tiles."""
    causal, padded = masks(2, 9)["causal"], masks(2, 9)["padded"]
    assert Mask.of(causal, mask_kind(causal)) == Mask(None, CAUSAL.code) == Mask.of(None, None)
    assert Mask.of(padded, mask_kind(padded)).seen is padded
    assert Mask.of(causal, None) == Mask(causal, ANY), "nobody looked"


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


@pytest.mark.slow
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


def test_the_compiled_kernel_takes_what_it_can_and_gives_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = (t.detach() for t in tensors(1, 5))
    kernel = next(kernel for kernel in KERNELS if isinstance(kernel, OneDnn))
    start_with(kernel, monkeypatch)
    if kernel.takes(Inputs(q, k, v, CAUSAL_MASK, 0.3)):
        results = kernel.forward(Inputs(q, k, v, CAUSAL_MASK, 0.3))
        for result, usual in zip(results, attention(q, k, v, None, None, 0.3), strict=True):
            torch.testing.assert_close(result, usual, rtol=0, atol=0)
    assert not kernel.takes(Inputs(q.half(), k.half(), v.half(), CAUSAL_MASK, 0.3))
    assert not kernel.takes(Inputs(q[..., :8], k[..., :8], v[..., :8], CAUSAL_MASK, 0.3))
    assert not kernel.takes(Inputs(q[:0], k[:0], v[:0], CAUSAL_MASK, 0.3))
    assert not kernel.takes(Inputs(q, k, v, CAUSAL_MASK, -0.3))
    # Without oneDNN there are no such products; PyTorch's kernel gives the same.
    low = tensors(1, 70, (32, 32), torch.bfloat16)
    usual_low = attention(*low, None, None, 0.3)
    torch._C._set_mkldnn_enabled(False)
    try:
        assert not kernel.takes(Inputs(*low, CAUSAL_MASK, 0.3))
        without = attention(*low, None, None, 0.3)
    finally:
        torch._C._set_mkldnn_enabled(True)
    monkeypatch.setattr(onednn, "library", lambda: None)
    uncompiled = attention(*low, None, None, 0.3)
    for one, two, three in zip(usual_low, without, uncompiled, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(one, three, rtol=2e-2, atol=2e-2)


# -- the list of kernels ---------------------------------------------------------------------------


class Noted(PyTorch):
    """A kernel that takes some dtypes only, and notes what it is asked and what it computes."""

    name = "noted"

    def __init__(self, *dtypes: torch.dtype) -> None:
        self.dtypes = dtypes
        self.calls: list[str] = []

    def takes(self, inputs: Inputs) -> bool:
        self.calls.append("asked")
        return inputs.q.dtype in self.dtypes

    def forward(self, *args: Any) -> Any:
        self.calls.append("forward")
        return super().forward(*args)

    def backward(self, *args: Any) -> Any:
        self.calls.append("backward")
        return super().backward(*args)


def test_the_first_kernel_that_takes_the_tensors_computes_both_directions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    declines, takes = Noted(torch.float16), Noted(torch.float32)
    inputs = tensors(2, 9)
    usual = with_gradients(lambda q, k, v: attention(q, k, v, None, None, 0.3)[0], inputs)
    monkeypatch.setattr(attention_kernels, "KERNELS", (declines, takes, *KERNELS))
    noted = with_gradients(lambda q, k, v: attention(q, k, v, None, None, 0.3)[0], inputs)
    assert declines.calls == ["asked", "asked"]
    assert takes.calls == ["asked", "forward", "asked", "backward"]
    for one, other in zip(usual, noted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_a_kernel_for_another_device_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = Noted(torch.float32)
    elsewhere.device = "xpu"
    monkeypatch.setattr(attention_kernels, "KERNELS", (elsewhere, *KERNELS))
    assert attention_kernels.devices() == {"cpu", "cuda", "xpu"}
    attention(*tensors(1, 5), None, None, 0.3)
    assert elsewhere.calls == []


@pytest.mark.parametrize("device", sorted(attention_kernels.devices()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_last_kernel_of_a_device_takes_everything(device: str, dtype: torch.dtype) -> None:
    last = [kernel for kernel in KERNELS if kernel.device == device][-1]
    for heads in ((7, 3), (16, 32)):
        q, k, v = (t.detach() for t in tensors(2, 9, heads, dtype))
        for mask in (CAUSAL_MASK, Mask(masks(2, 9)["padded"], 99)):
            for scale in (0.3, -1.0):
                assert last.takes(Inputs(q, k, v, mask, scale))
            assert last.takes(Inputs(q[:0], k[:0], v[:0], mask, 0.3))


def test_without_a_kernel_for_its_device_a_call_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.detach() for t in tensors(1, 5))
    monkeypatch.setattr(attention_kernels, "KERNELS", (Noted(torch.float16),))
    with pytest.raises(GraphError, match=r"no attention kernel takes .*; there are noted \(cpu\)"):
        attention_kernels.kernel_for(Inputs(q, k, v, CAUSAL_MASK, 0.3))


@pytest.mark.parametrize("kind", ["causal", "padded", "window"])
def test_one_kernels_backward_reads_what_anothers_forward_returned(kind: str) -> None:
    """Settings may change between the two: any kernel that takes the tensors must do."""
    q, k, v = (t.detach() for t in tensors(2, 70))
    tensor = masks(2, 70)[kind]
    mask = Mask.of(tensor, mask_kind(tensor))
    able = [kernel for kernel in ON_CPU if kernel.takes(Inputs(q, k, v, mask, 0.3))]
    grad = torch.randn(2, 6, 70, 32, generator=torch.Generator().manual_seed(9))
    true_inputs = [t.double().requires_grad_() for t in (q, k, v)]
    true_out = by_definition(*true_inputs, tensor)
    true = torch.autograd.grad((true_out * grad.double()).sum(), true_inputs)
    for one in able:
        out, lse = one.forward(Inputs(q, k, v, mask, 0.3))
        for other in able:
            gradients = other.backward(Inputs(q, k, v, mask, 0.3), out, lse, grad)
            for g, t in zip(gradients, true, strict=True):
                assert g.is_contiguous()
                torch.testing.assert_close(g.double(), t, rtol=1e-4, atol=2e-5)


def test_a_kernel_may_know_a_kind_of_mask_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks of the kind are found for it; a kernel that does not know the kind reads the mask."""
    kinds: list[int] = []

    class Windows(Noted):
        mask_kinds = (MaskKind(7, lambda mask: not bool(mask[..., -1, 0].any())), CAUSAL)

        def takes(self, inputs: Inputs) -> bool:
            kinds.append(inputs.mask.kind)
            return False

    monkeypatch.setattr(attention_kernels, "KERNELS", (Windows(), *KERNELS))
    found = {name: int(mask_kind(mask)) for name, mask in masks(1, 9).items()}
    assert found == {"causal": CAUSAL.code, "padded": 7, "window": 7}
    inputs = tensors(1, 9)
    window = masks(1, 9)["window"]
    out, _ = attention(*inputs, window, mask_kind(window), 0.3)
    assert kinds == [7]
    torch.testing.assert_close(out, by_definition(*inputs, window), rtol=1e-4, atol=2e-5)


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
