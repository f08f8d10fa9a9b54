"""Several adapters over one base, side by side: one is active, and every program reads that one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import LoraConfig
from torch import nn

from ..adapters import values_of
from ..compiler.check_lora import check_lora
from ..config import Config
from ..errors import AdapterError, ConfigError
from ..passes.graph.site import Site
from ..weights.base import Base

DEFAULT = "default"


class NamedAdapters:
    """The adapters of a base, by name.

    They have the same sites, ranks and scalings: those are in the captured graphs, so that switching is a matter of
    which tensors a program is given, and nothing is captured, compiled or copied.

    Args:
        base: its own adapter is the one called "default".

    Attributes:
        active: the name of the one that is used.
        tensors: of each, by store key.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.active = DEFAULT
        own = {
            t.key: base.store[t.key]
            for s in adapted(base)
            for t in base.adapter.tensors(s).values()
        }
        own |= {key: base.store[key] for key in base.trained}
        self.tensors = {DEFAULT: {key: p for key, p in own.items() if isinstance(p, nn.Parameter)}}

    def add(self, name: str, config: LoraConfig) -> dict[str, nn.Parameter]:
        """Make a new adapter.

        Raises:
            ConfigError: a name that is taken, or a config with other ranks, scalings or targets.
        """
        if name in self.tensors:
            raise ConfigError(f"there is an adapter {name!r}; there are: {', '.join(self.tensors)}")
        if not name.isidentifier():
            raise ConfigError(f"adapter name {name!r}; accepted: letters, digits and _")
        check_same(self.base, config, name)
        new: dict[str, nn.Parameter] = {}
        values = values_of(config)
        for site in adapted(self.base):
            made = values.initialize(self.base, site)
            for role, tensor in self.base.adapter.tensors(site).items():
                new[tensor.key] = nn.Parameter(made[role])
        for copy, key in self.base.trained.items():
            new[copy] = nn.Parameter(self.base.store[key].detach().to(torch.float32, copy=True))
        self.tensors[name] = new
        return new

    def check(self, name: str) -> str:
        """``name``, if there is such an adapter.

        Raises:
            AdapterError: there is none.
        """
        if name not in self.tensors:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(self.tensors)}")
        return name


def adapted(base: Base) -> Iterator[Site]:
    return (s for s in base.sites.values() if s.adapt)


def check_same(base: Base, config: LoraConfig, name: str) -> None:
    """Raise if ``config`` does not describe the adapter that the graphs were captured with.

    Raises:
        ConfigError: naming the first site that differs.
    """
    theirs = Config(lora=check_lora(config))
    for site in base.sites.values():
        if not site.adapt:
            continue
        new = (theirs.rank(site.name), theirs.scaling(site.name))
        if new != (site.r, site.scaling):
            raise ConfigError(
                f"adapter {name!r} has rank {new[0]} and scaling {new[1]:g} at {site.name}; accepted: those of this "
                f"model, {site.r} and {site.scaling:g}"
            )
