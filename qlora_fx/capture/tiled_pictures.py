"""Pictures in tiles of one size, joined behind the tower: those of LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision.

``pixel_values [pictures, tiles, channels, height, width]`` hold each picture as a whole and cut into tiles, as many as its
row of ``image_sizes [pictures, 2]`` asks for. Behind the tower models go from picture to picture: they join its tiles, cut
off what it was filled up with, shrink it where it is large, and end each row with a token of its own. No graph can
follow that. So before the graph ``image_sizes`` becomes a table that says of each token which features it is mixed of; it
is read off what the model's own function makes of numbered features.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..errors import CaptureError, InputError
from .pictures import TABLE, check_placeholders, part_of

PACKERS = frozenset({"LlavaNextModel", "LlavaNextVideoModel", "LlavaOnevisionModel"})
"""Have ``pack_image_features``, which is linear in features."""
SHRINKING = frozenset({"LlavaOnevisionModel"})
"""Shrink large pictures, by bilinear interpolation: a token is mixed of four features."""
CUT_IF_ALONE = "batch_num_images"
"""How many pictures each row of a batch has; several are not cut into tiles."""


class TiledPictures:
    """Puts the table of features into a call's arguments.

    Args:
        model: a transformers model of ``PACKERS``; its tensors are not read.

    Attributes:
        tile: height and width of a tile, in pixels.
        side: rows and columns of features that a tile becomes.
        patches_per_token: 1, for the table has a row for each token of the text.
        placeholders: ids of the tokens that stand for pictures.
    """

    patches_per_token = 1

    def __init__(self, model: nn.Module) -> None:
        self.packer = part_of(model, PACKERS)
        self.config = self.packer.config
        self.file: Any = sys.modules[type(self.packer).__module__]
        self.tile: int = self.config.vision_config.image_size
        self.side: int = self.tile // self.config.vision_config.patch_size
        self.placeholders = {self.config.image_token_id}

    def add(self, values: dict[str, Any]) -> None:
        """Replace ``image_sizes`` by the table, and ``pixel_values`` by tiles that are not filling.

        Reads the sizes, which waits for a GPU, and counts on the CPU.

        Raises:
            InputError: sizes are missing or of other pictures, there are more or fewer tiles than they ask for, or the text
                has other room.
        """
        together = values.pop(CUT_IF_ALONE, None)
        pictures, sizes = values.get("pixel_values"), values.get(TABLE)
        if pictures is None:
            return
        if sizes is None:
            raise InputError(
                f"pixel_values without {TABLE}; accepted: the height and width of each picture [pictures, 2]"
            )
        pairs: list[list[int]] = torch.as_tensor(sizes).tolist()
        cut = [True] * len(pairs)
        if together is not None:
            numbers = torch.as_tensor(together).tolist()
            cut = [n == 1 for n in numbers for _ in range(n)]
            if len(cut) != len(pairs):
                raise InputError(
                    f"{CUT_IF_ALONE}={numbers} are {len(cut)} pictures, {TABLE} has {len(pairs)} rows; accepted: as many"
                )
        grids = [
            self.grid(pair) if alone else (0, 0) for pair, alone in zip(pairs, cut, strict=True)
        ]
        counts = [1 + rows * columns for rows, columns in grids]
        values["pixel_values"] = joined_tiles(pictures, counts)
        table = self.table(pairs, grids, values)
        check_placeholders(values, self.placeholders, len(table))
        values[TABLE] = table.to(pictures.device)

    def grid(self, size: list[int]) -> tuple[int, int]:
        """In how many rows and columns of tiles a picture is cut."""
        rows, columns = self.file.get_anyres_image_grid_shape(
            size, self.config.image_grid_pinpoints, self.tile
        )
        return rows, columns

    def table(
        self, sizes: list[list[int]], grids: list[tuple[int, int]], told: Mapping[str, Any]
    ) -> torch.Tensor:
        """What each token is mixed of.

        Features of all tiles are numbered one after the other, and the token at the end of a row has the next number.

        Returns:
            int64 ``[tokens, 1]``, numbers of features; of models that shrink pictures, four numbers and their weights in
            float64 ``[tokens, 8]``.
        """
        total = sum(1 + rows * columns for rows, columns in grids) * self.side**2
        tables, begin = [], 0
        for size, grid in zip(sizes, grids, strict=True):
            tables.append(self.mixed(size, grid, begin, total, told))
            begin += (1 + grid[0] * grid[1]) * self.side**2
        table = torch.cat(tables) if tables else torch.zeros(0, 8, dtype=torch.float64)
        return table if type(self.packer).__name__ in SHRINKING else table[:, :1].long()

    def mixed(
        self,
        size: list[int],
        grid: tuple[int, int],
        begin: int,
        newline: int,
        told: Mapping[str, Any],
    ) -> torch.Tensor:
        """The rows of one picture, whose features are numbered from ``begin``: float64 ``[tokens, 8]``.

        Three features are packed by the model: the number of a feature of the whole picture, or -1 for those of tiles,
        and the row and column of the latter in the joined tiles. Of what was shrunk these are between those of the four
        that it is mixed of, as far from each as its weight says.
        """
        (rows, columns), side = grid, self.side
        numbers = torch.arange(begin, begin + (1 + rows * columns) * side**2)
        whole = torch.stack((numbers[: side**2], *[torch.zeros_like(numbers[: side**2])] * 2), -1)
        height, width = rows * side, columns * side
        places = torch.cartesian_prod(torch.arange(height), torch.arange(width))
        tiles = torch.cat((torch.full_like(places[:, :1], -1), places), -1)
        tiles = tiles.view(rows, side, columns, side, 3).transpose(1, 2).reshape(-1, side**2, 3)
        packed = self.pack(torch.cat((whole[None], tiles)).double(), size, newline, told)
        table = torch.zeros(len(packed), 8, dtype=torch.float64)
        table[:, 0], table[:, 4] = packed[:, 0], 1
        of_tiles = packed[:, 0] < 0
        if of_tiles.any():
            joined = numbers[side**2 :].view(rows, columns, side, side).transpose(1, 2)
            joined = joined.reshape(height, width)
            at = packed[of_tiles, 1:]
            first = at.floor()
            (y, x), (up, left) = first.long().unbind(1), (at - first).unbind(1)
            below, beside = (y + 1).clamp(max=height - 1), (x + 1).clamp(max=width - 1)
            table[of_tiles] = torch.stack(
                (
                    *(joined[i, j].double() for i in (y, below) for j in (x, beside)),
                    *(v * h for v in (1 - up, up) for h in (1 - left, left)),
                ),
                dim=1,
            )
        return table

    def pack(
        self, features: torch.Tensor, size: list[int], newline: int, told: Mapping[str, Any]
    ) -> torch.Tensor:
        """What the model makes of features ``[tiles, patches, 3]`` of one picture: ``[tokens, 3]``."""
        names = inspect.signature(self.packer.pack_image_features).parameters
        options = {
            "vision_feature_select_strategy": "full",  # asked for a warning only
            "vision_aspect_ratio": told.get("vision_aspect_ratio")
            or getattr(self.config, "vision_aspect_ratio", None),
        }
        packed: torch.Tensor
        (packed,), _ = self.packer.pack_image_features(
            [features],
            [size],
            image_newline=torch.tensor([newline, 0, 0], dtype=features.dtype),
            **{k: v for k, v in options.items() if k in names},
        )
        return packed


def joined_tiles(pictures: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The tiles of all pictures ``[tiles, channels, height, width]``, without filling.

    Raises:
        InputError: there are others than ``counts``.
    """
    if pictures.dim() == 5:
        if len(pictures) == len(counts) and max(counts, default=0) <= pictures.shape[1]:
            return torch.cat([tiles[:n] for tiles, n in zip(pictures, counts, strict=True)])
    elif pictures.dim() == 4 and len(pictures) == sum(counts):
        return pictures
    raise InputError(
        f"pixel_values have shape {list(pictures.shape)}, {TABLE} ask for {counts} tiles of the pictures; accepted: "
        f"[{len(counts)}, at least {max(counts, default=0)}, channels, height, width] or the tiles alone "
        f"[{sum(counts)}, channels, height, width]"
    )


# -- while a model is traced ----------------------------------------------------------------------


@contextlib.contextmanager
def all_tiles_at_once(model: nn.Module) -> Iterator[None]:
    """Let tokens be mixed by the table, which is in the place of ``image_sizes``."""
    packer = part_of(model, PACKERS)
    if packer is None:
        yield
        return
    with mock.patch.object(type(packer), "pack_image_features", mixed_by_table):
        yield


def mixed_by_table(
    model: Any,
    image_features: Any,
    image_sizes: torch.Tensor,
    *_: Any,
    image_newline: Any,
    **__: Any,
) -> tuple[list[torch.Tensor], None]:
    """The model's ``pack_image_features``, over features of all tiles ``[tiles, features, hidden]``.

    Raises:
        CaptureError: there are others than the table is of.
    """
    features, side = image_features.joined(0), TiledPictures(model).side
    if features.shape[1] != side**2:
        raise CaptureError(
            f"the tower gives {features.shape[1]} features of a tile; accepted: {side} x {side}, one for each patch "
            "(vision_feature_select_strategy leaves out the class token or not)"
        )
    known = torch.cat((features.flatten(0, 1), image_newline[None].to(features)))
    count = max(image_sizes.shape[1] // 2, 1)
    parts = known[image_sizes[:, :count].long()]
    if count == 1:
        return [parts[:, 0]], None
    exact = torch.promote_types(features.dtype, torch.float32)
    weights = image_sizes[:, count:, None].to(exact)
    return [(parts.to(exact) * weights).sum(1).to(features.dtype)], None
