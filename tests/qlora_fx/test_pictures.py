"""Pictures of any number and size: counted before the graph, apart in attention, one capture for all."""

from __future__ import annotations

import copy
from typing import Any

import qlora_fx
import pytest
import torch
from families import FAMILIES, build
from families.batches import IMAGE
from families.pictures import with_pictures
from peft import LoraConfig
from qlora_fx.errors import InputError
from qlora_fx.passes.lowering.compiled_body import CompiledBody
from qlora_fx.runtime.attention_kernels import devices
from qlora_fx.testing.check import compare, randomize_adapter
from qlora_fx.transform import graph_text

BY_TYPE = {f.model_type: f for f in FAMILIES}
LORA = LoraConfig(r=4, target_modules="all-linear")
FIRST = with_pictures(3, 30, (0, (1, 4, 4)), (0, (1, 6, 4)), (1, (1, 4, 8)), (2, (1, 4, 4)))


def transformed(model_type: str, **options: Any) -> tuple[Any, Any]:
    model = build(BY_TYPE[model_type]).train()
    told = {"compute_dtype": torch.float32, "example_inputs": FIRST, "backend": "eager"} | options
    qmodel = qlora_fx.transform(copy.deepcopy(model), LORA, **told)
    randomize_adapter(qmodel)
    return model, qmodel


@pytest.mark.parametrize(
    ("model_type", "backend"),
    [
        pytest.param("qwen2_5_vl", "eager", marks=pytest.mark.slow),  # trainers run it
        ("qwen3_vl", "aot_eager"),
    ],
)
def test_one_capture_takes_pictures_of_any_number_and_size(model_type: str, backend: str) -> None:
    """Windows, positions interpolated in a table, features added in deeper layers; another capture would warn."""
    model, qmodel = transformed(model_type, backend=backend)
    batches = (
        FIRST,
        with_pictures(2, 25, (1, (1, 4, 6))),
        with_pictures(2, 41, (0, (1, 8, 8)), (1, (1, 4, 4)), (1, (1, 2, 4))),
    )
    for inputs in batches if backend == "eager" else batches[:2]:
        report = compare(model, qmodel, inputs, all_outputs=False)
        assert report.passed, str(report)
        assert min(line.norm for line in report.sites) > 0
    bodies = [body for program in qmodel.programs for body in program.run.children()]
    assert all(body.compilations <= 1 for body in bodies if isinstance(body, CompiledBody))


@pytest.mark.slow
def test_a_video_beside_pictures() -> None:
    model, qmodel = transformed("qwen2_5_vl")
    for inputs in (
        with_pictures(2, 40, (0, (2, 4, 4)), (0, (1, 4, 4)), (1, (1, 2, 8))),
        with_pictures(2, 30, (0, (1, 4, 4)), (1, (3, 2, 4)), (1, (2, 4, 4))),
    ):
        report = compare(model, qmodel, inputs, all_outputs=False)
        assert report.passed, str(report)


def test_what_is_counted_is_what_the_model_counts() -> None:
    """Positions given by the caller are left alone; of those not given the model's own loss tells."""
    model, qmodel = transformed("qwen2_vl")
    positions, _ = model.model.get_rope_index(
        **{
            k: FIRST[k]
            for k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        }
    )
    with torch.no_grad():
        losses = [
            float(qmodel(**FIRST).loss),
            float(qmodel(**FIRST, position_ids=positions).loss),
            float(qmodel(**FIRST, position_ids=positions * 2).loss),
        ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.skipif(not devices(), reason="no kernel is for this machine")
def test_attention_skips_what_is_of_other_pictures() -> None:
    """The kernel that skips hidden tiles runs in the tower, whose layers are one body, windows or not."""
    _, qmodel = transformed("qwen2_5_vl")
    bodies = graph_text(qmodel).split("\ndef ")
    (layer,) = (body for body in bodies if body.startswith("Qwen2_5_VLVisionBlock"))
    assert layer.count("qlora_fx.attention(") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda b: b | {"pixel_values": b["pixel_values"][:-4]},
            r"pixel_values has 84 patches, image_grid_thw=\[\[1, 4, 4\], .* stands for 88; accepted: as many",
        ),
        (
            lambda b: b | {"input_ids": b["input_ids"].masked_fill(b["input_ids"] == IMAGE, 7)},
            r"input_ids have 0 placeholders for pictures \(ids \[3, 4\]\), the pictures become 22 tokens",
        ),
    ],
)
def test_pictures_that_do_not_fit_are_told(change: Any, said: str) -> None:
    _, qmodel = transformed("qwen2_vl")
    with pytest.raises(qlora_fx.InputError, match=said):
        qmodel(**change(FIRST))


@pytest.mark.parametrize(
    ("model_type", "backend"),
    [
        ("llava", "eager"),
        *(
            pytest.param(model_type, "eager", marks=pytest.mark.slow)
            for model_type in ("aria", "gemma3", "gemma4", "idefics3", "llama4", "paligemma")
        ),
        *(
            pytest.param(model_type, "inductor", marks=pytest.mark.slow)
            for model_type in ("llava", "qwen2_audio")
        ),
    ],
)
def test_a_row_that_was_cut_short_is_told_as_by_transformers(model_type: str, backend: str) -> None:
    """Features of one picture would go to the places of the next."""
    inputs = BY_TYPE[model_type].batch(3, 21)
    model, qmodel = transformed(model_type, example_inputs=inputs, backend=backend)
    there = int((inputs["input_ids"] == IMAGE).sum())
    loss = qmodel(**inputs).loss
    short = inputs | {"input_ids": inputs["input_ids"].clone()}
    short["input_ids"][0, (short["input_ids"][0] == IMAGE).nonzero()[0]] = 7
    with pytest.raises(ValueError, match="tokens do not match"):
        model(**short)
    with pytest.raises(InputError, match=f"has {there - 1} placeholders for the {there} features"):
        qmodel(**short)
    assert torch.equal(qmodel(**inputs).loss, loss)


@pytest.mark.slow
def test_tiles_of_pictures_are_free_of_the_rows() -> None:
    """InternVL: a row has none, one or several tiles of one size; that size is written into the graph."""
    model = build(BY_TYPE["internvl"]).train()
    family = BY_TYPE["internvl"]
    first = family.batch(2, 21)
    more = {k: torch.cat([v, v]) if k == "pixel_values" else v for k, v in first.items()}
    more["input_ids"] = more["input_ids"].clone()
    more["input_ids"][:, 6:10] = IMAGE
    qmodel = qlora_fx.transform(
        copy.deepcopy(model),
        LORA,
        compute_dtype=torch.float32,
        example_inputs=first,
        backend="eager",
    )
    randomize_adapter(qmodel)
    for inputs in (first, more):
        report = compare(model, qmodel, inputs, all_outputs=False)
        assert report.passed, str(report)
