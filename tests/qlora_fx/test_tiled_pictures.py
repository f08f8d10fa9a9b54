"""Pictures in tiles, whose features are joined behind the tower: one capture for any number of any size."""

from __future__ import annotations

import copy
from typing import Any

import qlora_fx
import numpy as np
import pytest
import torch
from families import FAMILIES, build
from families.batches import IMAGE, VIDEO, floats, text
from families.pictures import TILED, TILES, pictures_in_tiles, take_places, with_tiles
from packaging.version import Version
from peft import LoraConfig
from PIL import Image
from qlora_fx.capture.tiled_pictures import TiledPictures
from qlora_fx.testing.check import compare, randomize_adapter
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

BY_TYPE = {f.model_type: f for f in FAMILIES}
LORA = LoraConfig(r=4, target_modules="all-linear")
SQUARE = ((60, 60), 5, 24)
SHRUNK = ((60, 60), 5, 10)
"""Four rows and columns of features become two."""


def transformed(model: Any, **options: Any) -> Any:
    told = {"compute_dtype": torch.float32, "backend": "eager"} | options
    qmodel = qlora_fx.transform(copy.deepcopy(model), LORA, **told)
    randomize_adapter(qmodel)
    return qmodel


def pass_for(model: Any, qmodel: Any, *batches: Any) -> None:
    for inputs in batches:
        report = compare(model, qmodel, inputs, all_outputs=False)
        assert report.passed, str(report)
        assert min(line.norm for line in report.sites) > 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_capture_takes_pictures_that_shrink_or_are_not_cut(backend: str) -> None:
    """A token is mixed of four features; several pictures of a row are one tile each."""
    model = build(BY_TYPE["llava_onevision"]).train()
    first = with_tiles(3, 21, (0, *SHRUNK), (1, *TILED[0]), (2, *TILED[1]), together=True)
    qmodel = transformed(model, example_inputs=first, backend=backend)
    whole = ((0, (60, 60), 1, 5), (0, (60, 30), 1, 5), (2, *TILED[2]))
    pass_for(
        model,
        qmodel,
        first,
        with_tiles(3, 50, *whole, together=True),
        with_tiles(2, 40, (1, *SHRUNK), (1, *TILED[2])),
        pictures_in_tiles(1, 30),
    )
    assert len(list(qmodel.programs)) == 1
    for body in next(iter(qmodel.programs)).run.children():
        assert backend == "eager" or (body.compilations == 1 and not body.warned)


@pytest.mark.parametrize(
    "model_type", ["llava_next", pytest.param("llava_next_video", marks=pytest.mark.slow)]
)
def test_one_capture_takes_pictures_of_any_number_and_size(model_type: str) -> None:
    model = build(BY_TYPE[model_type]).train()
    first = pictures_in_tiles(3, 21)
    qmodel = transformed(model, example_inputs=first)
    batches = (
        with_tiles(2, 40, (0, *SQUARE), (1, *TILED[1])),
        with_tiles(3, 50, (1, *TILED[0]), (1, *TILED[2])),
    )
    alone = copy.copy(first)  # tiles without what fills them up
    alone["pixel_values"] = first["pixel_values"].flatten(0, 1)
    pass_for(model, qmodel, first, *batches, alone)
    assert len(list(qmodel.programs)) == 1


@pytest.mark.parametrize(
    ("model_type", "ends"),
    [
        ("llava_onevision", 1),
        pytest.param(
            "llava_next_video",
            0,
            marks=pytest.mark.skipif(
                Version(torch.__version__) < Version("2.13"),
                reason="PyTorch 2.11 writes the number of videos into the graph",
            ),
        ),
    ],
)
def test_one_capture_takes_videos_of_any_number_and_length(model_type: str, ends: int) -> None:
    """Four features of a frame become a token; OneVision ends a video with a token of its own."""
    model = build(BY_TYPE[model_type]).train()
    for module in (model, model.model):
        module.config.video_token_id = VIDEO

    def videos(rows: int, tokens: int, frames: int, of: tuple[int, ...]) -> Any:
        inputs = text(rows, tokens)
        take_places(inputs, ((row, frames + ends, VIDEO) for row in of))
        return inputs | {"pixel_values_videos": floats(len(of), frames, 3, 30, 30)}

    first = videos(3, 21, 3, (0, 1, 2))
    qmodel = transformed(model, example_inputs=first)
    pass_for(model, qmodel, first, videos(3, 21, 5, (1,)), videos(2, 41, 4, (0, 1)))
    assert len(list(qmodel.programs)) == 1


def test_what_the_processor_returns_is_taken() -> None:
    """Of real pictures, one of which is alone in its row."""
    model = build(BY_TYPE["llava_onevision"]).train()
    processor = LlavaOnevisionImageProcessorPil(size={"height": 30, "width": 30}, **TILES)
    random = np.random.default_rng(0)
    sizes = ((31, 30), (52, 17), (40, 90))
    pictures = [Image.fromarray(random.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in sizes]
    processed = dict(processor([[pictures[0]], pictures[1:]], return_tensors="pt"))
    assert processed["batch_num_images"].tolist() == [1, 2]
    inputs = text(2, 30)
    take_places(inputs, ((0, 10, IMAGE), (1, 5, IMAGE), (1, 5, IMAGE)))
    qmodel = transformed(model, example_inputs=pictures_in_tiles(2, 21))
    pass_for(model, qmodel, inputs | processed)
    assert len(list(qmodel.programs)) == 1


def test_tokens_are_numbered_as_the_model_joins_them() -> None:
    """Two tiles side by side, of two rows and columns each; every row ends with the token of that."""
    values = with_tiles(1, 21, (0, *TILED[0]))
    TiledPictures(build(BY_TYPE["llava_next"])).add(values)
    assert values["image_sizes"].flatten().tolist() == [
        *(0, 1, 2, 3),
        *(4, 5, 8, 9, 12),
        *(6, 7, 10, 11, 12),
    ]
    assert values["pixel_values"].shape == (3, 3, 30, 30)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: {"image_sizes": None}, "pixel_values without image_sizes; accepted: the height"),
        (
            lambda b: {"image_sizes": b["image_sizes"][:-1]},
            r"shape \[3, 3, 3, 30, 30\], image_sizes ask for \[3, 3\] tiles of the pictures; accepted: \[2, at least 3",
        ),
        (
            lambda b: {"image_sizes": b["image_sizes"] * 2},
            r"image_sizes ask for \[3, 5, 3\] tiles of the pictures; accepted: \[3, at least 5",
        ),
        (
            lambda b: {"batch_num_images": [1, 1]},
            r"batch_num_images=\[1, 1\] are 2 pictures, image_sizes has 3 rows; accepted: as many",
        ),
        (
            lambda b: {"input_ids": b["input_ids"].masked_fill(b["input_ids"] == IMAGE, 7)},
            r"input_ids have 0 placeholders for pictures \(ids \[4\]\), the pictures become 40 tokens",
        ),
    ],
)
def test_tiles_that_do_not_fit_are_told(change: Any, said: str) -> None:
    inputs = pictures_in_tiles(3, 21)
    with pytest.raises(qlora_fx.InputError, match=said):
        TiledPictures(build(BY_TYPE["llava_onevision"])).add(inputs | change(inputs))
