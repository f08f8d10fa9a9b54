"""What is traced is what the model computes, gradients stopped where it stops them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from qlora_fx.capture.export_shortcuts import LongFormulaError
from qlora_fx.capture.skeleton import Capture, Skeleton
from sharing import hold
from small_models import TOY_INPUT, VOCABULARY, batch, captured
from torch import nn
from torch.testing import assert_close
from torch.utils import _pytree as pytree
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)


class Stopped(nn.Module):
    """No gradient goes through ``scale`` or ``gain``, but that of ``kept``; none to the first use of ``last``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.scale, self.last = (nn.Linear(8, 8) for _ in range(3))
        self.gain = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.first(x)
        with torch.no_grad():
            scale = self.scale(h) + self.last(x)
            with torch.enable_grad():
                kept = self.scale(x)
            largest, places = scale.max(dim=-1)
            gain = self.gain.exp()
        return {
            "y": self.last(h * scale + kept) * gain,
            "largest": largest + h.sum(-1),
            "places": places,
        }


def values(capture: Capture, model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """What the captured graph gives, with the model's own weights."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    weights |= dict(model.named_buffers()) | capture.constants
    given = [
        weights[n.meta["stored"]] if "stored" in n.meta else inputs[n.meta["input"]]
        for n in capture.gm.graph.find_nodes(op="placeholder")
    ]
    return pytree.tree_unflatten(capture.gm(*given), capture.out_spec)


@pytest.mark.parametrize("ambient", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_gradients_stop_where_the_model_stops_them(ambient: Callable[[], Any]) -> None:
    model, x = Stopped(), torch.randn(2, 3, 8)
    with ambient():
        capture = captured(model, TOY_INPUT)
    traced, true = (tuple(y.values()) for y in (values(capture, model, {"x": x}), model(x)))
    weights = list(model.parameters())
    for a, b in zip(traced, true, strict=True):
        assert_close(a, b)
        assert a.requires_grad == b.requires_grad
    for a, b in zip(traced[:2], true[:2], strict=True):
        of_a, of_b = (
            torch.autograd.grad(t.square().sum(), weights, retain_graph=True, allow_unused=True)
            for t in (a, b)
        )
        for ours, its in zip(of_a, of_b, strict=True):
            assert (ours is None) == (its is None)
            if its is not None:
                assert_close(ours, its)


TINY = {"vocab_size": VOCABULARY, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0}
ENCODER_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(**TINY, d_kv=8, d_ff=64, num_layers=1, num_heads=4, dropout_rate=0.0)
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(
            **TINY,
            **{f"{part}_layers": 1 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
            dropout=0.0,
            bos_token_id=1,
            eos_token_id=1,
            forced_eos_token_id=None,
        )
    ),
}


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_labels_of_any_length_have_one_graph(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder reads them without the last one: of two tokens one, of one none."""
    tries: list[Any] = []
    export = Skeleton.export
    monkeypatch.setattr(Skeleton, "export", lambda *args: (tries.append(args), export(*args))[1])
    torch.manual_seed(0)
    model, text = ENCODER_DECODERS[family](), batch(3, 7)
    text.pop("labels")
    capture = captured(model, text | {"labels": batch(3, 5)["labels"]})
    assert len(tries) == 1
    for length in (1, 2, 3, 9):
        inputs = text | {"labels": batch(3, length, padded=0)["labels"]}
        assert hold(capture.guards, inputs)
        ours, its = values(capture, model, inputs), model(**inputs)
        assert_close(ours["loss"], its.loss)
        assert_close(ours["logits"], its.logits)


class Windows(nn.Module):
    """Stages as Swin's, each half as large as the one before, in windows of 4 x 4 after padding."""

    def __init__(self, stages: int) -> None:
        super().__init__()
        self.mix, self.stages = nn.Linear(3, 3), stages

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = pixel_values.permute(0, 2, 3, 1)
        for _ in range(self.stages):
            rows, height, width, channels = x.shape
            x = nn.functional.pad(x, (0, 0, 0, -width % 4, 0, -height % 4))
            down, across = x.shape[1] // 4, x.shape[2] // 4
            x = x.view(rows, down, 4, across, 4, channels).transpose(2, 3)
            x = self.mix(x.reshape(-1, 16, channels))
            x = x.view(rows, down, across, 4, 4, channels).transpose(2, 3)
            x = x.reshape(rows, 4 * down, 4 * across, channels)[:, :height, :width]
            x = x[:, ::2, ::2]
        return x.sum((1, 2))


def test_sizes_of_pictures_are_fixed_where_their_formulas_are_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Swin of any size was captured in minutes, and Inductor did not come to its end."""
    tried: list[Any] = []
    export = Skeleton.export

    def told(*args: Any) -> Any:
        try:
            program = export(*args)
        except Exception as error:
            tried.append(type(error))
            raise
        tried.append(None)
        return program

    monkeypatch.setattr(Skeleton, "export", told)
    model, inputs = Windows(4), {"pixel_values": torch.randn(3, 3, 18, 22)}
    capture = captured(model, inputs)
    assert tried == [LongFormulaError, None]
    picture = next(n for n in capture.gm.graph.find_nodes(op="placeholder") if "input" in n.meta)
    rows, *sizes = picture.meta["val"].shape
    assert isinstance(rows, torch.SymInt)
    assert sizes == [3, 18, 22]
    assert_close(values(capture, model, inputs), model(**inputs))


class Compared(nn.Module):
    """Asks whether one picture has as many windows as all have, as their views do."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        rows, _, height, _ = pixel_values.shape
        windows = height // 4
        x = pixel_values if rows * windows == windows else pixel_values.clone()
        return self.mix(x.mean((2, 3)))


def test_one_picture_is_captured_with_a_size_that_fits_it() -> None:
    """Of any size it was captured for two and more, and the call was refused."""
    model, inputs = Compared(), {"pixel_values": torch.randn(1, 3, 18, 22)}
    capture = captured(model, inputs)
    assert hold(capture.guards, inputs)
    assert_close(values(capture, model, inputs), model(**inputs))
