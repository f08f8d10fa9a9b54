"""Pictures of several sizes, filled up to one: one capture for any number of any size."""

from __future__ import annotations

import copy
from typing import Any

import qlora_fx
import pytest
import torch
from families import FAMILIES, build
from families.batches import IMAGE
from families.pictures import frames, slots, with_frames, with_slots
from families.settings import DECODER, HEAD, PIXTRAL_VISION
from peft import LoraConfig
from qlora_fx.capture.padded_pictures import PaddedPictures
from qlora_fx.testing.check import compare, randomize_adapter
from transformers import LlavaConfig, LlavaForConditionalGeneration

BY_TYPE = {f.model_type: f for f in FAMILIES}
LORA = LoraConfig(r=4, target_modules="all-linear")
OTHERS = (
    ((2, 25), (1, (1, 2))),
    ((3, 40), (0, (5, 1)), (1, (1, 3)), (1, (4, 2)), (2, (1, 1))),
)


def transformed(model: Any, **options: Any) -> Any:
    told = {"compute_dtype": torch.float32, "backend": "eager"} | options
    qmodel = qlora_fx.transform(copy.deepcopy(model), LORA, **told)
    randomize_adapter(qmodel)
    return qmodel


def test_one_capture_takes_frames_of_any_number_and_size() -> None:
    """Patches are merged to tokens, whose order of channels and places is the model's."""
    model = build(BY_TYPE["mistral3"]).train()
    first = frames(3, 21)
    qmodel = transformed(model, example_inputs=first, backend="aot_eager")
    for inputs in (first, *(with_frames(*shape, *pictures) for shape, *pictures in OTHERS)):
        report = compare(model, qmodel, inputs, all_outputs=False)
        assert report.passed, str(report)
        assert min(line.norm for line in report.sites) > 0
    assert len(list(qmodel.programs)) == 1
    for body in next(iter(qmodel.programs)).run.children():
        assert body.compilations <= 1


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llava_with_the_same_tower(attention: str) -> None:
    """Pixtral 12B: a patch is a token. Without ``image_sizes`` frames are full."""
    config = LlavaConfig(
        text_config=DECODER | HEAD | {"model_type": "mistral"},
        vision_config=PIXTRAL_VISION,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    first = with_frames(3, 21, (0, (2, 2)), (0, (1, 3)), (2, (3, 2)), side=15)
    qmodel = transformed(model, example_inputs=first)
    batches = [with_frames(*shape, *pictures, side=15) for shape, *pictures in OTHERS]
    full = with_frames(2, 25, (0, (2, 3)), (1, (2, 1)), side=15, seen=False)
    for inputs in (*batches, full):
        report = compare(model, qmodel, inputs, all_outputs=False)
        assert report.passed, str(report)
    whole = full | {"image_sizes": torch.tensor([[30, 45], [30, 45]])}
    assert torch.equal(qmodel(**full).loss, qmodel(**whole).loss)
    assert len(list(qmodel.programs)) == 1


@pytest.mark.slow
def test_one_capture_takes_pictures_in_any_number_of_slots() -> None:
    """Gemma 4: how many tokens pictures become is decided by where their patches are."""
    model = build(BY_TYPE["gemma4"]).train()
    first = slots(3, 21)
    qmodel = transformed(model, example_inputs=first)
    more = (0, (4, 4)), (1, (2, 2)), (1, (4, 4)), (2, (2, 8))
    for inputs in (first, with_slots(2, 25, (1, (2, 2))), with_slots(3, 41, *more)):
        report = compare(model, qmodel, inputs, all_outputs=False)
        assert report.passed, str(report)
        assert min(line.norm for line in report.sites) > 0
    assert len(list(qmodel.programs)) == 1


def test_patches_are_counted_token_by_token() -> None:
    counts = PaddedPictures(build(BY_TYPE["mistral3"]))
    values = with_frames(1, 21, (0, (1, 2)), (0, (1, 1)))
    counts.add(values)
    assert values["image_sizes"].tolist() == [
        [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1],
        [0, 0, 2], [0, 0, 3], [0, 1, 2], [0, 1, 3],
        [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda b: {"image_sizes": b["image_sizes"][:-1]},
            "image_sizes has 3 rows, pixel_values has 4 pictures; accepted: a row for each",
        ),
        (
            lambda b: {"image_sizes": b["image_sizes"] * 2},
            "image_sizes has a picture of 120 x 120, in a frame of 90 x 90; accepted: up to the frame",
        ),
        (
            lambda b: {"image_sizes": b["image_sizes"] // 2},
            r"a picture of 15 x 30, in a frame of .* in whole tokens of 30 x 30",
        ),
        (
            lambda b: {"input_ids": b["input_ids"].masked_fill(b["input_ids"] == IMAGE, 7)},
            r"input_ids have 0 placeholders for pictures \(ids \[4\]\), the pictures become 12 tokens",
        ),
    ],
)
def test_frames_that_do_not_fit_are_told(change: Any, said: str) -> None:
    model = build(BY_TYPE["mistral3"])
    inputs = frames(3, 21)
    with pytest.raises(qlora_fx.InputError, match=said):
        PaddedPictures(model).add(inputs | change(inputs))
