"""New adapters."""

from __future__ import annotations

from torch import nn

from ..weights.base import Base
from . import values_of
from .trained import add_trained


def add_adapters(base: Base) -> None:
    """Make the tensors of each adapted site that has none yet, and the copies that train as they are."""
    values = values_of(base.config.lora)
    for site in base.sites.values():
        tensors = base.adapter.tensors(site) if site.adapt else {}
        if any(tensor.key in base.store for tensor in tensors.values()) or not tensors:
            continue
        new = values.initialize(base, site)
        for role, tensor in tensors.items():
            base.store.add(tensor.key, nn.Parameter(new[role]))
    add_trained(base)
