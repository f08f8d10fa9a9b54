"""What of the kernels for GPUs can be seen without one: the pieces around PyTorch's kernels, and dispatch.

``tests/cuda`` has the rest, for a machine with a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime import fastest_dtype, gpu, loss
from qlora_fx.runtime import ops as operators
from qlora_fx.runtime.attention_kernels import Inputs, kernel_for
from qlora_fx.runtime.attention_kernels import cuda as kernels
from qlora_fx.runtime.attention_kernels.kernel import CAUSAL, Mask, empty_output
from qlora_fx.runtime.schemes.four_bit import FourBit
from qlora_fx.weights.base import activation_dtype
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- attention -------------------------------------------------------------------------------------


class OnCuda:
    """As much of a tensor as a kernel asks for before it takes a call."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.numel = tensor.shape, tensor.dtype, tensor.numel
        self.device = SimpleNamespace(type="cuda", index=0)


@pytest.mark.parametrize(
    ("dtype", "size", "causal", "capability", "expected"),
    [
        (torch.bfloat16, 64, True, (9, 0), "flash"),
        (torch.float16, 256, True, (8, 0), "flash"),
        (torch.bfloat16, 64, False, (9, 0), "efficient"),
        (torch.bfloat16, 264, True, (9, 0), "efficient"),
        (torch.float32, 64, True, (9, 0), "efficient"),
        (torch.float16, 64, True, (7, 5), "efficient"),
        (torch.float64, 64, True, (9, 0), "definition"),
    ],
)
def test_which_kernel_takes_a_call_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    size: int,
    causal: bool,
    capability: tuple[int, int],
    expected: str,
) -> None:
    monkeypatch.setattr(kernels, "capability", lambda device: capability)
    q: Any = OnCuda(torch.empty(1, 4, 8, size, dtype=dtype))
    mask = Mask(None, CAUSAL.code) if causal else Mask(torch.ones(1, 1, 8, 8).bool(), 0)
    assert kernel_for(Inputs(q, q, q, mask, 0.1)).name == expected


@pytest.mark.parametrize("kind", ["causal", "padded"])
def test_the_kernel_of_last_resort_is_the_definition(kind: str) -> None:
    q, k, v = (random(2, n, 7, 6, dtype=torch.float64, seed=i) for i, n in enumerate((4, 2, 2)))
    seen = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7).clone()
    if kind == "padded":  # the first two queries of the second row see nothing
        seen[1, :, :, :2] = False
    mask = Mask(None, CAUSAL.code) if kind == "causal" else Mask(seen, 0)
    true = [t.clone().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(2, 1) for t in true[1:])
    scores = (0.3 * true[0] @ keys.mT).masked_fill(~seen, float("-inf"))
    expected = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0) @ values
    grad = random(2, 4, 7, 6, dtype=torch.float64, seed=9)
    inputs = Inputs(q, k, v, mask, 0.3)
    out, lse = kernels.Definition().forward(inputs)
    torch.testing.assert_close(out, expected)
    assert lse.dtype == torch.float32
    seen_by_some = seen.any(-1).expand_as(lse)
    torch.testing.assert_close(lse[seen_by_some], scores.logsumexp(-1)[seen_by_some].float())
    assert not lse.isneginf().any(), "a kernel would divide by it"
    found = kernels.Definition().backward(inputs, out, lse, grad)
    for mine, wanted in zip(found, torch.autograd.grad(expected, true, grad), strict=True):
        torch.testing.assert_close(mine, wanted)


def test_heads_are_filled_up_in_the_layout_that_the_kernels_take_for_granted() -> None:
    q = random(2, 5, 4, 20).transpose(1, 2)  # [batch, heads, sequence, size] of a model
    v = random(2, 5, 4, 12).transpose(1, 2)
    for filled, t in zip(kernels.aligned(q, v), (q, v), strict=True):
        assert filled.shape == (2, 4, 5, 24)
        assert filled.transpose(1, 2).is_contiguous()
        assert torch.equal(filled[..., : t.shape[3]], t)
        assert not filled[..., t.shape[3] :].any()
    whole = random(2, 5, 4, 24).transpose(1, 2)
    assert kernels.aligned(whole)[0] is whole
    shifted = random(2, 5, 4, 25)[..., 1:].transpose(1, 2)  # rows that are not aligned
    assert kernels.aligned(shifted)[0].is_contiguous()


@pytest.mark.parametrize("keys", [8, 13])
def test_a_mask_becomes_a_bias_with_aligned_rows(keys: int) -> None:
    seen = torch.ones(keys, keys, dtype=torch.bool).tril().expand(2, 1, keys, keys).clone()
    seen[1, :, :, :3] = False
    q = random(2, 4, keys, 16)
    bias = kernels.bias(Mask(seen, 0), q)
    assert bias is not None
    assert bias.shape == (2, 4, keys, keys)
    assert not any(s % kernels.ALIGNMENT for s in bias.stride()[:3])
    sees_something = seen.any(-1, keepdim=True)
    assert torch.equal(bias == 0, (seen | ~sees_something).expand_as(bias))
    assert kernels.bias(Mask(None, CAUSAL.code), q) is None


def test_results_of_filled_up_heads_get_the_strides_of_the_operator() -> None:
    q, v = random(2, 4, 5, 20), random(2, 4, 5, 12)
    out, _ = empty_output(q, v)
    result = random(2, 5, 4, 24).transpose(1, 2)
    found = kernels.in_place_of_output(result, q, v)
    assert found.stride() == out.stride()
    assert torch.equal(found, result[..., :12])


# -- experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[5, 5, 21, 40], [0, 40, 40, 40], [7, 9, 20, 33]])
@pytest.mark.parametrize("double", [False, True])
def test_products_in_one_launch_are_those_group_by_group(
    monkeypatch: pytest.MonkeyPatch, ends: list[int], double: bool
) -> None:
    """PyTorch has the grouped product for CPUs too."""
    q = Quantization(double_quant=double)
    parts = FourBit(q).quantize(random(4, 64, 128, seed=1))
    keys = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")
    stored = [parts.get(k) for k in keys]
    at = torch.tensor(ends)
    x = random(40, 128, dtype=torch.bfloat16)
    weight = random(4, 64, 128, dtype=torch.bfloat16, seed=2)
    grad = random(40, 64, dtype=torch.bfloat16, seed=3)
    found = []
    for together in (False, True):
        monkeypatch.setattr(operators, "takes_groups", lambda x, *sizes, yes=together: yes)
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = operators.grouped_linear(*inputs, at)
        z = operators.grouped_linear_4bit(inputs[0], *stored, at, [64, 128], 64, "nf4")
        found.append([y, z, *torch.autograd.grad(y, inputs, grad, retain_graph=True)])
        found[-1] += torch.autograd.grad(z, inputs[:1], grad)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        assert other[ends[-1] :].count_nonzero() == 0 or len(other) == 4


def test_matrices_that_the_grouped_product_cannot_read_are_copied() -> None:
    plain = torch.zeros(4, 64, 96)
    assert operators.whole_strides(plain) is plain
    turned = plain.transpose(1, 2)
    assert operators.whole_strides(turned) is turned
    rows = torch.zeros(4, 64, 97)[..., :96]
    for odd in (rows, rows.transpose(1, 2), torch.zeros(4, 64, 96, 2)[..., 0]):
        assert operators.whole_strides(odd).is_contiguous()


def test_a_stack_is_dequantized_in_pieces_that_32_bits_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q = Quantization()
    parts = FourBit(q).quantize(random(5, 64, 128, seed=1))
    keys = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")
    stored = [parts[k] for k in keys]
    whole = operators.dense_stack(*stored, [64, 128], 64, "nf4")
    monkeypatch.setattr(operators, "ELEMENTS", 2 * 64 * 128 + 1)
    assert torch.equal(operators.dense_stack(*stored, [64, 128], 64, "nf4"), whole)
    true = FourBit(q).dequantize(parts, (5, 64, 128), torch.bfloat16)
    torch.testing.assert_close(whole, true, rtol=1e-2, atol=1e-3)


# -- loss ------------------------------------------------------------------------------------------


def test_on_a_gpu_logits_are_held_by_the_thousand_rows() -> None:
    rows, vocabulary, inner = 4096, 128256, 2048
    held = {
        name: loss.workspace(rows, vocabulary, inner, 2, dense=True, device=torch.device(name))
        for name in ("cpu", "cuda")
    }
    logits = held["cuda"] - 2 * rows * inner * 2
    assert 1000 < logits / (2 * vocabulary) < 1100
    assert held["cpu"] < held["cuda"]


LOSSES = """
import torch
from qlora_fx.runtime.loss_triton import losses_to_gradients
torch.manual_seed(0)
for vocabulary in (101, 5000):
    for scale, cap, bias in ((1.0, 0.0, None), (2.0, 3.0, torch.randn(vocabulary))):
        logits, labels = torch.randn(7, vocabulary), torch.randint(0, vocabulary, (7,))
        true = logits.double().requires_grad_()
        capped = (true + (0 if bias is None else bias.double())) * scale
        capped = cap * (capped / cap).tanh() if cap else capped
        expected = torch.nn.functional.cross_entropy(capped, labels, reduction="sum")
        expected.backward()
        total = losses_to_gradients(logits, bias, labels, scale, cap)
        torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.double(), true.grad, rtol=1e-5, atol=1e-6)
print("right")
"""


SPANS = """
import torch
from qlora_fx.runtime.attention_kernels.spans_triton import spans
from qlora_fx.runtime.attention_kernels import varlen
torch.manual_seed(0)
for length in (1, 9, 1500):
    at = torch.arange(length)
    causal = (at[:, None] >= at).expand(2, 1, length, length)
    noise = torch.rand(2, 1, length, length) < 0.4
    for mask in (causal, noise, causal & (at >= 3), noise.mT, noise & ~noise):
        assert torch.equal(spans(mask[:, 0]).long(), varlen.spans(mask))
print("right")
"""


@pytest.mark.parametrize("program", [LOSSES, SPANS], ids=["loss", "spans"])
def test_a_kernel_under_tritons_interpreter(program: str) -> None:
    pytest.importorskip("triton")  # PyTorch for CPUs comes without it
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("right\n"), done.stderr


@pytest.mark.parametrize(
    ("capability", "triton", "groups"),
    [((6, 1), False, False), ((7, 5), True, False), ((8, 6), True, True)],
)
def test_older_gpus_take_pytorchs_operators(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: bool, groups: bool
) -> None:
    monkeypatch.setattr(gpu, "capability", lambda device: capability)
    monkeypatch.setattr(gpu, "has_triton_package", lambda: True)
    monkeypatch.setattr(operators, "capability", lambda device: capability)
    x: Any = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=torch.device("cuda:0"))
    assert gpu.runs_triton(x.device) == triton
    assert operators.takes_groups(x, 64, 96) == groups
    assert not operators.takes_groups(x, 64, 20)
    x.dtype = torch.float32
    assert not operators.takes_groups(x, 64, 96)


# -- dtypes and devices ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)]
)
def test_bfloat16_where_the_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(fastest_dtype, "capability", lambda device: capability)
    choice = fastest_dtype.fastest.__wrapped__("cuda:0")
    assert choice.dtype == dtype
    assert choice.reason.startswith("a GPU has ")


def test_a_device_without_a_number_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert gpu.numbered(torch.device("cuda")) == torch.device("cuda:3")
    assert gpu.numbered(torch.device("cuda:1")) == torch.device("cuda:1")
    assert gpu.numbered(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize(
    ("model", "compute", "expected"),
    [
        (torch.float16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_a_model_of_16_bits_has_activations_of_16(
    model: torch.dtype, compute: torch.dtype, expected: torch.dtype
) -> None:
    skeleton: Any = SimpleNamespace(dtype=model)
    config: Any = SimpleNamespace(compute_dtype=compute)
    assert activation_dtype(skeleton, config) == expected
