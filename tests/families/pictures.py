"""Batches with images."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from .batches import EOS, IMAGE, VIDEO, classes, floats, ids, targets, text, unlabelled
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


def described(rows: int, tokens: int) -> Tensors:
    """An image of 16 patches and their mean, and text, for an encoder; other text for a decoder."""
    inputs = text(rows, tokens + 6)
    take_places(inputs, ((row, 17, IMAGE) for row in range(rows)))
    return inputs | {"pixel_values": floats(rows, 3, 32, 32), "labels": targets(rows, tokens)}


def listened(rows: int, tokens: int) -> Tensors:
    """Text with sound of one length in each row, four frames of which become a token."""
    inputs = text(rows, tokens)
    take_places(inputs, ((row, 8, IMAGE) for row in range(rows)))
    return inputs | {"input_features": floats(rows, 20, 32)}


def heard(mask: str) -> Batch:
    """Text with sound of several lengths, filled up to one; ``mask`` is what the model calls the frames that are sound."""

    def with_sounds(rows: int, tokens: int) -> Tensors:
        inputs = text(rows, tokens)
        lengths = [(32, 20, 28)[row % 3] for row in range(rows)]
        take_places(inputs, ((row, length // 4, IMAGE) for row, length in enumerate(lengths)))
        there = torch.arange(32) < torch.tensor(lengths)[:, None]
        return inputs | {"input_features": floats(rows, 20, 32), mask: there.long()}

    return with_sounds


def questioned(rows: int, tokens: int) -> Tensors:
    """The text again, for the part that asks the image."""
    return image_text(3, 30, 30)(rows, tokens) | {"qformer_input_ids": ids(rows, tokens)}


def image_rows(rows: int, tokens: int) -> Tensors:
    """Fuyu's image: one vector per patch."""
    return placeholders(rows, tokens) | {"image_patches": floats(rows, 4, 3 * 4 * 4)}


def take_places(inputs: Tensors, pictures: Iterable[tuple[int, int, int]]) -> None:
    """Put placeholders into a text: row, tokens and id of each picture. There is no loss on them, and one token between two."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    free = [1] * len(ids)
    for row, tokens, placeholder in pictures:
        begin, end = free[row], free[row] + tokens
        free[row] = end + 1
        ids[row, begin:end], labels[row, begin:end] = placeholder, -100


def tiles(rows: int, tokens: int) -> Tensors:
    """Pictures in tiles of 16 patches, 4 of which become a token: two tiles in the first row."""
    inputs = text(rows, tokens)
    take_places(inputs, ((row, 4, IMAGE) for row in (0, *range(rows))))
    return inputs | {"pixel_values": floats(rows + 1, 3, 32, 32)}


def attended_tiles(rows: int, tokens: int) -> Tensors:
    """A picture per row, of two tiles in the first row and of one in others, that the text attends to."""
    inputs = text(rows, tokens)
    inputs["input_ids"][:, 0] = IMAGE
    there = torch.tensor([[1, 1]] + [[1, 0]] * (rows - 1))
    return inputs | {
        "pixel_values": floats(rows, 1, 2, 3, 32, 32),
        "aspect_ratio_ids": there.sum(1, keepdim=True),
        "aspect_ratio_mask": there[:, None],
        "cross_attention_mask": there[:, None, None].expand(rows, tokens, 1, 2),
    }


FRAMES = ((2, 2), (1, 3), (3, 1))
"""Rows and columns of tokens of a picture."""


def with_frames(
    rows: int,
    tokens: int,
    *pictures: tuple[int, tuple[int, int]],
    side: int = 30,
    seen: bool = True,
) -> Tensors:
    """Text with pictures of several sizes in frames of one, as Pixtral's processor returns them.

    Args:
        pictures: the row of the text, and rows and columns of tokens.
        side: of a token, in pixels.
        seen: ``image_sizes`` say how much of a frame is its picture; otherwise all of it is.
    """
    inputs = text(rows, tokens)
    frame = [max(size[i] for _, size in pictures) for i in range(2)]
    sizes = [size if seen else frame for _, size in pictures]
    take_places(
        inputs,
        ((row, math.prod(size), IMAGE) for (row, _), size in zip(pictures, sizes, strict=True)),
    )
    inputs["pixel_values"] = floats(len(pictures), 3, *(side * n for n in frame))
    if seen:
        inputs["image_sizes"] = side * torch.tensor(sizes)
    return inputs


def frames(rows: int, tokens: int) -> Tensors:
    """A picture per row and one more in the first."""
    others = ((row, FRAMES[row % len(FRAMES)]) for row in range(1, rows))
    return with_frames(rows, tokens, (0, FRAMES[0]), (0, (1, 2)), *others)


def with_tiles(
    rows: int,
    tokens: int,
    *pictures: tuple[int, tuple[int, int], int, int],
    together: bool = False,
) -> Tensors:
    """Text with pictures in tiles of 30 x 30 pixels, as LLaVA-NeXT's processor returns them, filled up to as many.

    Args:
        pictures: the row of the text, height and width in pixels, and how many tiles and tokens of the text it becomes.
        together: say how many pictures a row has, as LLaVA-OneVision's processor does: several are not cut.
    """
    inputs = text(rows, tokens)
    take_places(inputs, ((row, count, IMAGE) for row, _, _, count in pictures))
    inputs["pixel_values"] = floats(len(pictures), max(n for *_, n, _ in pictures), 3, 30, 30)
    inputs["image_sizes"] = torch.tensor([size for _, size, _, _ in pictures])
    if together:
        numbers = torch.tensor([row for row, *_ in pictures]).bincount(minlength=rows)
        inputs["batch_num_images"] = numbers[numbers > 0]
    return inputs


TILED = (((30, 60), 3, 14), ((31, 30), 3, 10), ((60, 30), 3, 16))
"""Height, width, tiles, tokens: two rows of patches in two tiles and the whole, the same cut to half, and lying."""
TILES: dict[str, list[list[int]]] = {"image_grid_pinpoints": [[30, 60], [60, 30], [60, 60]]}
"""Sizes that pictures are filled up to."""


def pictures_in_tiles(rows: int, tokens: int) -> Tensors:
    """A picture per row, of several sizes."""
    return with_tiles(rows, tokens, *((row, *TILED[row % len(TILED)]) for row in range(rows)))


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


def with_pictures(rows: int, tokens: int, *pictures: tuple[int, tuple[int, int, int]]) -> Tensors:
    """Text with pictures, given as ``(row, (frames, rows, columns of patches))``, as Qwen2-VL's processor returns them.

    One of several frames is a video.
    """
    inputs = text(rows, tokens)
    take_places(
        inputs,
        ((row, math.prod(grid) // 4, VIDEO if grid[0] > 1 else IMAGE) for row, grid in pictures),
    )
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    for name, patches, grids in (
        ("image", "pixel_values", [g for _, g in pictures if g[0] == 1]),
        ("video", "pixel_values_videos", [g for _, g in pictures if g[0] > 1]),
    ):
        if grids:
            inputs[f"{name}_grid_thw"] = torch.tensor(grids)
            inputs[patches] = floats(sum(map(math.prod, grids)), 3 * 2 * 4 * 4)
    return inputs


def patches(rows: int, tokens: int) -> Tensors:
    """A picture per row and one more in the first, of several sizes."""
    others = ((row, GRIDS[row % len(GRIDS)]) for row in range(1, rows))
    return with_pictures(rows, tokens, (0, GRIDS[0]), (0, (1, 2, 4)), *others)


def with_slots(
    rows: int, tokens: int, *pictures: tuple[int, tuple[int, int]], slots: int = 16
) -> Tensors:
    """Text with pictures of ``(row, (rows, columns of patches))``, each filled up to ``slots`` patches, as Gemma 4's processor
    returns them: 4 patches become a token."""
    inputs = text(rows, tokens)
    take_places(inputs, ((row, math.prod(size) // 4, IMAGE) for row, size in pictures))
    positions = torch.full((len(pictures), slots, 2), -1)
    for place, (_, (height, width)) in zip(positions, pictures, strict=True):
        grid = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        place[: len(grid)] = grid.flip(1)  # x, y
    return inputs | {
        "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
        "pixel_values": floats(len(pictures), slots, 3 * 4 * 4),
        "image_position_ids": positions,
    }


def slots(rows: int, tokens: int) -> Tensors:
    """A picture per row and one more in the first, of several sizes."""
    others = ((row, SLOTS[row % len(SLOTS)]) for row in range(1, rows))
    return with_slots(rows, tokens, (0, SLOTS[0]), (0, (2, 4)), *others)


SLOTS = ((4, 4), (2, 8), (2, 2))
