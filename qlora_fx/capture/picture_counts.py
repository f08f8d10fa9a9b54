"""Which of the ways in which models are told their pictures a model has."""

from __future__ import annotations

from torch import nn

from .padded_pictures import TOWER, PaddedPictures
from .pictures import TABLE, PictureCounts, part_of, takes
from .tiled_pictures import PACKERS, TiledPictures


def picture_counts(model: nn.Module) -> PictureCounts | PaddedPictures | TiledPictures:
    """What counts the pictures of a call of the model."""
    if part_of(model, PACKERS) is not None:
        return TiledPictures(model)
    if part_of(model, TOWER) is not None and takes(model, TABLE):
        return PaddedPictures(model)
    return PictureCounts(model)
