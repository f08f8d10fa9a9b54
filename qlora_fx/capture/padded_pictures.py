"""Pictures of several sizes in frames of one: Pixtral's, in Mistral 3 and Large 4, LLaVA and LightOnOCR.

``pixel_values [pictures, channels, height, width]`` are filled up to the largest, and ``image_sizes [pictures, 2]`` say how
much of a frame is its picture. Models loop over those numbers, which no graph can follow. So before the graph
``image_sizes`` becomes a table of all patches that are of a picture, and tower and merger take them from there at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..errors import InputError
from ..transformers_internals import as_tower
from .pictures import TABLE, check_placeholders, part_of

TOWER = ("PixtralVisionModel",)
MERGERS = ("Mistral3PatchMerger", "MistralLarge4PatchMerger", "LightOnOcrPatchMerger")


class PaddedPictures:
    """Puts the table of patches into a call's arguments.

    Args:
        model: a transformers model with Pixtral's tower; its tensors are not read.

    Attributes:
        patches_per_token: how many patches become one token of the text.
        placeholders: ids of the tokens that stand for pictures.
    """

    def __init__(self, model: nn.Module) -> None:
        merger = part_of(model, MERGERS)
        self.patch_size: int = part_of(model, TOWER).patch_size
        self.side: int = 1 if merger is None else merger.spatial_merge_size
        self.patches_per_token = self.side**2
        token = getattr(getattr(model, "config", None), "image_token_id", None)
        self.placeholders = set() if token is None else {token}

    def add(self, values: dict[str, Any]) -> None:
        """Replace ``image_sizes``, or what they are without, by the table.

        Reads them, which waits for a GPU, and counts on the CPU.

        Raises:
            InputError: a picture does not fit into its frame or cannot be merged to tokens, or the text has other room.
        """
        pictures = values.get("pixel_values")
        if pictures is None:
            return
        frame = tuple(pictures.shape[2:])
        sizes = values.get(TABLE)
        sizes = (
            torch.tensor(frame).expand(len(pictures), 2)
            if sizes is None
            else torch.as_tensor(sizes)
        )
        pairs: list[list[int]] = sizes.tolist()
        self.check(pairs, len(pictures), frame)
        tables = [self.patches(i, height, width) for i, (height, width) in enumerate(pairs)]
        table = torch.cat(tables)
        check_placeholders(values, self.placeholders, len(table) // self.patches_per_token)
        values[TABLE] = table.to(pictures.device)

    def check(self, sizes: list[list[int]], pictures: int, frame: tuple[int, ...]) -> None:
        unit = self.patch_size * self.side
        if len(sizes) != pictures:
            raise InputError(
                f"{TABLE} has {len(sizes)} rows, pixel_values has {pictures} pictures; accepted: a row for each"
            )
        for height, width in sizes:
            fits = self.patch_size <= height <= frame[0] and self.patch_size <= width <= frame[1]
            rows, columns = height // self.patch_size, width // self.patch_size
            if not fits or rows % self.side or columns % self.side:
                raise InputError(
                    f"{TABLE} has a picture of {height} x {width}, in a frame of {frame[0]} x {frame[1]}; accepted: up to the "
                    f"frame, in whole tokens of {unit} x {unit}"
                )

    def patches(self, picture: int, height: int, width: int) -> torch.Tensor:
        """Picture, row and column of each patch of a picture, token by token: int64 ``[patches, 3]``."""
        rows, columns, side = height // self.patch_size, width // self.patch_size, self.side
        places = torch.cartesian_prod(
            torch.tensor([picture]), torch.arange(rows), torch.arange(columns)
        )
        tokens = places.view(rows // side, side, columns // side, side, 3).transpose(1, 2)
        return tokens.reshape(-1, 3)


# -- while a model is traced ----------------------------------------------------------------------


@contextlib.contextmanager
def all_frames_at_once(model: nn.Module) -> Iterator[None]:
    """Let the tower and what merges its patches take the table in place of ``image_sizes``."""
    tower, merger = part_of(model, TOWER), part_of(model, MERGERS)
    with contextlib.ExitStack() as stack:
        if tower is not None:
            stack.enter_context(mock.patch.object(type(tower), "forward", as_tower(of_all_frames)))
        if merger is not None:
            stack.enter_context(mock.patch.object(type(merger), "forward", merged))
        yield


def of_all_frames(
    tower: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **kwargs: Any
) -> Any:
    """The tower's forward. Patches of a picture attend to each other."""
    dtype = tower.patch_conv.weight.dtype
    picture, row, column = image_sizes.unbind(1)
    patches = tower.patch_conv(pixel_values.to(dtype))[picture, :, row, column][None]
    patches = tower.ln_pre(patches)
    mask = (picture[:, None] == picture[None, :])[None, None]
    if tower.config._attn_implementation == "eager":  # which adds it
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return tower.transformer(
        patches,
        attention_mask=mask,
        position_embeddings=tower.patch_positional_embedding(patches, image_sizes[:, 1:]),
        **kwargs,
    )


def merged(merger: Any, image_features: torch.Tensor, image_sizes: torch.Tensor) -> torch.Tensor:
    """The merger's forward: patches of a token lie one after the other; their channels go before their places."""
    count, width = merger.spatial_merge_size**2, image_features.shape[-1]
    tokens = image_features.view(-1, count, width).transpose(1, 2).reshape(-1, width * count)
    result: torch.Tensor = merger.merging_layer(tokens)
    return result
