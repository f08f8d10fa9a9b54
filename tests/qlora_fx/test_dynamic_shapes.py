"""Which sizes of a call's tensors are the batch, the text's length, or of pictures."""

from __future__ import annotations

from typing import Any

import torch
from qlora_fx.capture.dynamic_shapes import free_dims, is_about_dims, resized


def call(rows: int, tokens: int, **others: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"input_ids": (rows, tokens), **others}
    return {name: torch.zeros(shape, dtype=torch.long) for name, shape in shapes.items()}


def test_what_tells_of_each_picture_has_a_row_for_each() -> None:
    """Gemma 4; one picture is traced as two, and so is what tells where its patches are."""
    values = call(3, 21, pixel_values=(1, 16, 48), image_position_ids=(1, 16, 2))
    dims = free_dims(values, encoder_decoder=False)
    assert dims["pixel_values"] == dims["image_position_ids"] == {0: "pixel_values"}
    shapes = {name: tuple(t.shape) for name, t in resized(values).items()}
    assert shapes["pixel_values"][0] == shapes["image_position_ids"][0] > 1


def test_places_of_patches_have_no_size_of_the_text() -> None:
    """Behind a cache, with the pictures of the prompt and two tokens more."""
    dims = free_dims(call(3, 2, image_position_ids=(4, 16, 2)), encoder_decoder=False)
    assert dims["image_position_ids"] == {}


def test_one_token_is_traced_as_a_number_of_tokens_that_is_no_other_size() -> None:
    """Llama 3.2: two tiles of a picture are not two tokens, though export takes equal sizes for one."""
    values = call(3, 1, cross_attention_mask=(3, 1, 4, 2))
    shapes = {name: tuple(t.shape) for name, t in resized(values).items()}
    assert shapes == {"input_ids": (3, 3), "cross_attention_mask": (3, 3, 4, 2)}
    assert tuple(resized(call(1, 1))["input_ids"].shape) == (2, 2)


def test_a_constraint_that_torch_cannot_describe_is_about_sizes() -> None:
    """MiniMax M3's ``-(-S // 8)``: then torch.export decides which sizes are free."""
    assert is_about_dims(AssertionError("Cannot create Dim with inconsistent min=1, max=-oo"))
    assert not is_about_dims(AssertionError("Cannot create"))
