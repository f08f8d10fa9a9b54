"""Pictures of any number and size: what a model's Python would count in ``image_grid_thw`` is counted before the graph.

A batch of pictures is one row of patches, and ``image_grid_thw [pictures, 3]`` says how many frames, rows and columns of
patches each has. Models loop over its values, which no graph can follow: positions of the patches, where a picture or
a window ends, positions of the text's tokens around the pictures. transformers lets a caller compute all of that and
hand it in (``image_cu_seqlens``, ``image_position_ids``, ... and ``position_ids``); ``PictureCounts`` does, by transformers'
own functions, and the graph takes pictures of any number and size.
"""

from __future__ import annotations

import inspect
from collections.abc import Container, Iterable, Mapping, Set
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..transformers_internals import counts_of_grid
from .cache import past_tokens

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Prefix of arguments, and the argument with the patches ``[patches of all pictures, channels x frames x height x width]``."""


TABLE = "image_sizes"
"""Where it says how large pictures are within frames of one size, a table takes its place: picture, row and column of
each patch ``[patches, 3]`` (padded_pictures.py), or what each token is mixed of (tiled_pictures.py)."""
WIDTHS = (1, 3, 8)
"""Columns of such tables; sizes have two."""


def grid_of(modality: str) -> str:
    return f"{modality}_grid_thw"


def modality_of(name: str, values: Mapping[str, Any]) -> str | None:
    """``image`` or ``video`` for an argument whose sizes are those of pictures, not batch and sequence."""
    if name == TABLE and is_table(values[name]):
        return "image"
    for modality, patches in MODALITIES.items():
        of_it = name == patches or name.startswith(f"{modality}_")
        if of_it and is_grid(values.get(grid_of(modality))):
            return modality
    return None


def sizes_of_pictures(
    name: str, modality: str, values: Mapping[str, Any], patches_per_token: int
) -> dict[int, str]:
    """Which role the first size of such an argument has; none where it is a number of its own.

    ``{modality}_grid_thw`` for how many pictures there are, ``{modality}_tokens`` for the tokens that they become, and
    ``{modality}_patches``, always ``patches_per_token`` times as many.
    """
    if name == grid_of(modality):
        return {0: name}
    if name == TABLE:
        return {0: f"{modality}_patches"}
    patches, size = values.get(MODALITIES[modality]), values[name].shape[0]
    if (
        patches is None
        or name.startswith(f"{modality}_cu_")
        or patches.shape[0] % patches_per_token
    ):
        return {}
    if size == patches.shape[0]:
        return {0: f"{modality}_patches"}
    return {0: f"{modality}_tokens"} if size * patches_per_token == patches.shape[0] else {}


class PictureCounts:
    """Counts what a model would count in the grids of a call's pictures.

    Args:
        model: a transformers model; its tensors are not read.

    Attributes:
        patches_per_token: how many patches become one token of the text; 1 where the tower does not tell.
        placeholders: ids of the tokens that stand for pictures; empty where the tower does not tell.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tower = next((m for m in model.modules() if takes(m, "grid_thw")), None)
        self.text = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
        parts: Iterable[Any] = () if self.tower is None else self.tower.modules()
        sides = [m.spatial_merge_size for m in parts if hasattr(m, "spatial_merge_size")]
        self.patches_per_token = int(sides[0]) ** 2 if sides else 1
        names = ("image_token_id", "video_token_id") if sides else ()
        numbers = {getattr(getattr(self.text, "config", None), name, None) for name in names}
        self.placeholders: set[int] = {n for n in numbers if isinstance(n, int)}

    def add(self, values: dict[str, Any]) -> None:
        """Add to a call's arguments what the caller did not count.

        Reads the grids, which waits for a GPU, and counts on the CPU.

        Raises:
            InputError: there are more or fewer patches than the grids stand for, or than the text has room for.
        """
        grids = {m: values[grid_of(m)] for m in MODALITIES if is_grid(values.get(grid_of(m)))}
        given = {m: grid.cpu() for m, grid in grids.items() if MODALITIES[m] in values}
        if self.tower is None or not given:
            return
        self.check(values, given)
        counted: dict[str, torch.Tensor] = {}
        for modality, grid in given.items():
            counts = counts_of_grid(self.tower, grid)
            counted |= {f"{modality}_{name}": t for name, t in counts.items()}
        if "position_ids" not in values:
            counted |= self.positions(values)
        for name, tensor in counted.items():
            values.setdefault(name, tensor.to(next(iter(grids.values())).device))

    def check(self, values: Mapping[str, Any], grids: Mapping[str, torch.Tensor]) -> None:
        """Raise where patches, grids and placeholders are not of the same pictures."""
        total = 0
        for modality, grid in grids.items():
            name = MODALITIES[modality]
            patches, expected = values[name].shape[0], int(grid.prod(1).sum())
            if patches != expected:
                raise InputError(
                    f"{name} has {patches} patches, {grid_of(modality)}={grid.tolist()} stands for {expected}; accepted: as "
                    "many, frames x rows x columns of each picture"
                )
            total += expected // self.patches_per_token
        check_placeholders(values, self.placeholders, total)

    def positions(self, values: dict[str, Any]) -> dict[str, torch.Tensor]:
        """``position_ids`` of text and pictures; nothing where the model makes none, as behind a cache."""
        if self.text is None or "mm_token_type_ids" not in values or past_tokens(values):
            return {}
        names = inspect.signature(self.text.get_rope_index).parameters  # type: ignore[arg-type]
        given = {k: values[k] for k in names if k in values}
        on_cpu = {k: t.cpu() if isinstance(t, torch.Tensor) else t for k, t in given.items()}
        return {"position_ids": self.text.get_rope_index(**on_cpu)[0]}  # type: ignore[operator]


def part_of(model: nn.Module, classes: Container[str]) -> Any:
    """The first of a model's modules whose class has one of these names, or None."""
    return next((m for m in model.modules() if type(m).__name__ in classes), None)


def takes(module: nn.Module, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


def is_grid(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] == 3


def is_table(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.shape[1] in WIDTHS


def check_placeholders(values: Mapping[str, Any], placeholders: Set[int], tokens: int) -> None:
    """Raise where the text has not as many placeholders as pictures become tokens; on a GPU nobody looks."""
    ids = values.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.device.type != "cpu" or not placeholders:
        return
    found = sum(int((ids == number).sum()) for number in placeholders)
    if found != tokens:
        raise InputError(
            f"input_ids have {found} placeholders for pictures (ids {sorted(placeholders)}), the pictures become {tokens} "
            "tokens; accepted: as many. A row cut short by a maximal length may have lost some"
        )
