"""The loss of a frozen head without its logits, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_fx.config import Quantization
from qlora_fx.runtime import loss as module
from qlora_fx.runtime.loss import linear_cross_entropy
from qlora_fx.runtime.schemes.four_bit import FourBit
from torch import Tensor

ROWS, SIZE, VOCABULARY = 11, 24, 70


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    found = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(1))
    found[[0, 4, 5]] = -100
    return found


def by_definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    x = x.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(x, weight.double(), None if bias is None else bias.double())
    logits = logits * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total = torch.nn.functional.cross_entropy(logits, labels(), reduction="sum")
    (grad,) = torch.autograd.grad(total * 0.37, x)
    return total.detach(), grad


def ours(x: Tensor, weight: list[Tensor], bias: Any, scale: float, cap: float, kind: str) -> Any:
    x = x.detach().requires_grad_()
    shape = [VOCABULARY, SIZE]
    arguments = (x, weight, bias, labels(), -100, scale, cap, shape, 64, kind, True)
    total, count, _ = linear_cross_entropy(*arguments)
    (grad,) = torch.autograd.grad(total * 0.37, x)
    return total.detach(), count.detach(), grad


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("head", ["dense", "bfloat16", "double", "single"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 0.0), (2.0, 3.0)])
def test_loss_and_gradient_are_the_definitions(
    monkeypatch: pytest.MonkeyPatch, scale: float, softcap: float, head: str, small: bool
) -> None:
    if small:  # many chunks of rows, tiles of rows and parts of the vocabulary
        monkeypatch.setitem(module.SIZES, "cpu", module.Sizes(chunk=800, tile=300, vocabulary=64))
    x, weight, bias = random(ROWS, SIZE), random(VOCABULARY, SIZE, seed=2), None
    storage, kind = [weight], ""
    if head == "bfloat16":
        storage = [weight.bfloat16()]
        weight, bias = storage[0].float(), random(VOCABULARY, seed=3)
    elif head != "dense":
        q = Quantization(double_quant=head == "double")
        parts = FourBit(q).quantize(weight)
        keys = ("packed", "absmax", "nested_absmax", "offset", "nested_quant_map")
        storage, kind = [parts[k] for k in keys if k in parts], "nf4"
        weight = FourBit(q).dequantize(parts, (VOCABULARY, SIZE), torch.float32)
    true, true_grad = by_definition(x, weight, bias, scale, softcap)
    total, count, grad = ours(x, storage, bias, scale, softcap, kind)
    assert float(count) == ROWS - 3
    torch.testing.assert_close(total.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-6)
    assert not grad[[0, 4, 5]].any(), "rows without a label have no gradient"


def test_no_more_logits_are_held_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    to_gradients = module.losses_to_gradients

    def noted(logits: Tensor, *args: Any) -> Tensor:
        held.append(logits.nbytes)
        return to_gradients(logits, *args)

    monkeypatch.setattr(module, "losses_to_gradients", noted)
    monkeypatch.setitem(module.SIZES, "cpu", module.Sizes(chunk=800, tile=300, vocabulary=64))
    ours(random(ROWS, SIZE), [random(VOCABULARY, SIZE, seed=2)], None, 1.0, 0.0, "")
    assert sum(held) == (ROWS - 3) * VOCABULARY * 4
    assert 400 < max(held) <= 800


def test_no_label_at_all_gives_no_gradient() -> None:
    x = random(3, SIZE).requires_grad_()
    none = torch.full((3,), -100)
    weight = [random(VOCABULARY, SIZE)]
    shape = [VOCABULARY, SIZE]
    total, count, _ = linear_cross_entropy(
        x, weight, None, none, -100, 1.0, 0.0, shape, 64, "", True
    )
    (grad,) = torch.autograd.grad(total, x)
    assert (float(total.detach()), float(count.detach())) == (0.0, 0.0)
    assert not grad.any()


def test_the_operator_passes_opcheck() -> None:
    x = random(ROWS, SIZE).requires_grad_()
    weight, shape = [random(VOCABULARY, SIZE)], [VOCABULARY, SIZE]
    arguments = (x, weight, None, labels(), -100, 1.0, 0.0, shape, 64, "", True)
    torch.library.opcheck(linear_cross_entropy, arguments)
