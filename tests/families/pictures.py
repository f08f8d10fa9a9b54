"""Batches with images."""

from __future__ import annotations

import math

import torch

from .batches import EOS, IMAGE, classes, floats, ids, targets, text, unlabelled
from .build import Batch, Tensors


def images(*shape: int) -> Batch:
    """Images of a fixed shape, without labels."""
    return lambda rows, tokens: {"pixel_values": floats(rows, *shape)}


def labelled_images(rows: int, tokens: int) -> Tensors:
    return {"pixel_values": floats(rows, 3, 32, 32), "labels": classes(rows)}


def large_images(rows: int, tokens: int) -> Tensors:
    return {"pixel_values": floats(rows, 3, 64, 64), "labels": classes(rows)}


def videos(rows: int, tokens: int) -> Tensors:
    """Four frames per row."""
    return {"pixel_values": floats(rows, 4, 3, 32, 32), "labels": classes(rows)}


def masked_images(rows: int, tokens: int) -> Tensors:
    """The noise says which patches are hidden; left out, it is drawn in the forward."""
    return {"pixel_values": floats(rows, 3, 32, 32), "noise": floats(rows, 16)}


def pixels(rows: int, tokens: int) -> Tensors:
    """Images as ids of colours."""
    return {"input_ids": ids(rows, tokens), "labels": classes(rows)}


def flat_images(rows: int, tokens: int) -> Tensors:
    """Images of 4x4 patches, flattened as SigLIP 2's processor does."""
    return {
        "pixel_values": floats(rows, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]).repeat(rows, 1),
    }


def captions(rows: int, tokens: int) -> Tensors:
    """An image and a text that ends with EOS, in every row."""
    inputs = unlabelled(rows, tokens)
    last = inputs["attention_mask"].sum(dim=1, keepdim=True) - 1
    inputs["input_ids"].scatter_(1, last, EOS)
    return inputs | {"pixel_values": floats(rows, 3, 30, 30)}


def captioned(rows: int, tokens: int) -> Tensors:
    """An image beside its text, with no placeholders for it."""
    return text(rows, tokens) | {"pixel_values": floats(rows, 3, 30, 30)}


def flat_captions(rows: int, tokens: int) -> Tensors:
    return unlabelled(rows, tokens) | flat_images(rows, tokens)


def from_images(rows: int, tokens: int) -> Tensors:
    return {"pixel_values": floats(rows, 3, 32, 32), "labels": targets(rows, tokens)}


def placeholders(rows: int, tokens: int) -> Tensors:
    """Text with 4 image tokens per row, on which there is no loss."""
    inputs = text(rows, tokens)
    for name, value in (("input_ids", IMAGE), ("labels", -100)):
        inputs[name][:, 1:5] = value
    return inputs


def image_text(*shape: int) -> Batch:
    return lambda rows, tokens: placeholders(rows, tokens) | {"pixel_values": floats(rows, *shape)}


def prefixed(rows: int, tokens: int) -> Tensors:
    """Image and prompt see each other in full; only what follows them is predicted."""
    inputs = image_text(3, 30, 30)(rows, tokens)
    types = torch.zeros_like(inputs["input_ids"])
    types[:, tokens // 2 :] = 1
    labels = inputs["labels"].masked_fill(types == 0, -100)
    return inputs | {"token_type_ids": types, "labels": labels}


def typed(rows: int, tokens: int) -> Tensors:
    """Tokens of an image see each other in full."""
    inputs = image_text(3, 30, 30)(rows, tokens)
    return inputs | {"token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def answered(rows: int, tokens: int) -> Tensors:
    """Image and text for an encoder, other text for a decoder."""
    return image_text(3, 30, 30)(rows, tokens) | {"labels": targets(rows, tokens)}


def questioned(rows: int, tokens: int) -> Tensors:
    """The text again, for the part that asks the image."""
    return image_text(3, 30, 30)(rows, tokens) | {"qformer_input_ids": ids(rows, tokens)}


def image_rows(rows: int, tokens: int) -> Tensors:
    """Fuyu's image: one vector per patch."""
    return placeholders(rows, tokens) | {"image_patches": floats(rows, 4, 3 * 4 * 4)}


def with_sizes(rows: int, tokens: int) -> Tensors:
    sizes = torch.tensor([[30, 30]]).repeat(rows, 1)
    return image_text(3, 30, 30)(rows, tokens) | {"image_sizes": sizes}


def regions(rows: int, tokens: int) -> Tensors:
    """Text, then 4 regions of an image as vectors."""
    inputs = text(rows, tokens)
    there = torch.ones(rows, 4, dtype=torch.long)
    return inputs | {
        "visual_embeds": floats(rows, 4, 24),
        "visual_attention_mask": there,
        "visual_token_type_ids": there,
        "labels": torch.cat([inputs["labels"], there * -100], dim=1),
    }


GRIDS = ((1, 4, 4), (1, 6, 4), (1, 2, 8))
"""Frames, rows and columns of patches; 4 patches become a token."""


def patches(rows: int, tokens: int) -> Tensors:
    """A picture per row and one more in the first, of several sizes, flattened as Qwen2-VL's processor does."""
    inputs = text(rows, tokens)
    grids = [GRIDS[0], (1, 2, 4), *(GRIDS[row % len(GRIDS)] for row in range(1, rows))]
    begins = [(0, 1), (0, 6), *((row, 1) for row in range(1, rows))]
    for (row, begin), grid in zip(begins, grids, strict=True):
        end = begin + math.prod(grid) // 4
        inputs["input_ids"][row, begin:end] = IMAGE
        inputs["labels"][row, begin:end] = -100
    return inputs | {
        "pixel_values": floats(sum(map(math.prod, grids)), 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
    }
