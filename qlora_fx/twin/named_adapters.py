"""Several adapters over one base, side by side: one is active, and every program reads that one."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn

from ..adapters.initialize import adapted_sites, new_adapter
from ..adapters.peft_format import first_difference
from ..adapters.trained import new_copy
from ..compiler.check_lora import check_lora
from ..errors import AdapterError, ConfigError
from ..runtime.flat_update import update_together
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
        keys = [t.key for s in adapted_sites(base) for t in base.adapter.tensors(s).values()]
        self.tensors = {DEFAULT: {k: parameter(base.store[k]) for k in (*keys, *base.trained)}}
        update_together(self.tensors[DEFAULT].values())

    def add(self, name: str, config: LoraConfig) -> dict[str, nn.Parameter]:
        """Make a new adapter.

        Raises:
            ConfigError: a name that is taken, a config with other ranks or scalings, or a bias that trains.
        """
        if name in self.tensors:
            raise ConfigError(f"there is an adapter {name!r}; there are: {', '.join(self.tensors)}")
        if not name.isidentifier():
            raise ConfigError(f"adapter name {name!r}; accepted: letters, digits and _")
        difference = first_difference(check_lora(config), self.base.sites)
        if difference:
            raise ConfigError(f"adapter {name!r}: {difference}; accepted: what is here")
        if self.base.config.lora.bias != "none":
            raise ConfigError(
                f"adapter {name!r} beside one with bias={self.base.config.lora.bias!r}: a bias that trains is in the "
                'model\'s own place, as in PEFT; accepted: several adapters with bias="none"'
            )
        copies = {copy: new_copy(self.base, key) for copy, key in self.base.trained.items()}
        self.tensors[name] = new_adapter(self.base, config, adapted_sites(self.base)) | copies
        update_together(self.tensors[name].values())
        return self.tensors[name]

    def check(self, name: str) -> str:
        """``name``, if there is such an adapter.

        Raises:
            AdapterError: there is none.
        """
        if name not in self.tensors:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(self.tensors)}")
        return name


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor
