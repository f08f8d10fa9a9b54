"""New adapters."""

from __future__ import annotations

from collections.abc import Iterable

from peft import LoraConfig
from torch import nn

from ..passes.graph.site import Site
from ..weights.base import Base
from . import values_of
from .trained import add_trained


def adapted_sites(base: Base) -> list[Site]:
    return [site for site in base.sites.values() if site.adapt]


def new_adapter(base: Base, lora: LoraConfig, sites: Iterable[Site]) -> dict[str, nn.Parameter]:
    """New adapter tensors of ``sites``, by store key."""
    values = values_of(lora)
    made: dict[str, nn.Parameter] = {}
    for site in sites:
        new = values.initialize(base, site)
        made |= {t.key: nn.Parameter(new[role]) for role, t in base.adapter.tensors(site).items()}
    return made


def add_adapters(base: Base) -> None:
    """Make the tensors of each adapted site that has none yet, and the copies that train as they are."""
    bare = [
        site
        for site in adapted_sites(base)
        if not any(tensor.key in base.store for tensor in base.adapter.tensors(site).values())
    ]
    for key, tensor in new_adapter(base, base.config.lora, bare).items():
        base.store.add(key, tensor)
    add_trained(base)
