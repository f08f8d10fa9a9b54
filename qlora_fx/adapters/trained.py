"""Dense tensors that train beside the adapters (PEFT's ``bias`` and ``modules_to_save``): how they begin, PEFT's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..passes.graph.site import Site
from ..weights.base import Base


def add_trained(base: Base) -> None:
    """Make the float32 copy of each tensor that trains, with the tensor's values; those that exist stay."""
    for copy, key in base.trained.items():
        if copy not in base.store:
            base.store.add(copy, new_copy(base, key))


def new_copy(base: Base, key: str) -> nn.Parameter:
    """A float32 copy of the tensor ``key``, to be trained."""
    return nn.Parameter(base.store[key].detach().to(torch.float32, copy=True))


def trained_names(
    trained: Mapping[str, str], sites: Mapping[str, Site], path: Callable[[str], str]
) -> dict[str, str]:
    """PEFT's name of each copy, by store key.

    The module's own path; the bias of a module with an adapter lies in the wrapped module, ``base_layer``
    (``peft.tuners.tuners_utils.BaseTuner``, in PEFT 0.21).

    Args:
        trained: the tensor that each copy is of.
        path: of a module, as PEFT's wrappers lengthen it.
    """
    adapted = {s.name for s in sites.values() if s.adapt and s.kind in ("linear", "conv")}
    names = {}
    for copy, key in trained.items():
        owner, _, leaf = key.rpartition(".")
        inner = ["base_layer"] if owner in adapted else []
        names[copy] = ".".join(filter(None, [path(owner), *inner, leaf]))
    return names
