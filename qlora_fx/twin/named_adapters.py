"""Several adapters over one base, side by side: one is active, and every program reads that one."""

from __future__ import annotations

from dataclasses import replace

import torch
from peft import LoraConfig
from torch import nn

from ..adapters.initialize import adapted_sites, new_adapter
from ..adapters.side_by_side import shape_of, with_adapter
from ..adapters.trained import new_copy
from ..errors import AdapterError, ConfigError
from ..runtime.flat_update import update_together
from ..runtime.parameter_store import Store
from ..weights.base import Base

DEFAULT = "default"


class NamedAdapters:
    """The adapters of a base, by name.

    Each has a base of its own: the weights of the first, and the adapter's sites and tensors. Where sites, ranks and scalings
    are the same, switching is a matter of which tensors a program is given: nothing is captured, compiled or copied.

    Args:
        base: its own adapter is the one called "default".

    Attributes:
        active: the name of the one that is used.
        bases: of each.
        tensors: of each, by store key.
        shapes: of each, what of it is in captured graphs.
    """

    def __init__(self, base: Base) -> None:
        self.active = DEFAULT
        self.bases = {DEFAULT: base}
        self.shapes = {DEFAULT: shape_of(base)}
        keys = [t.key for s in adapted_sites(base) for t in base.adapter.tensors(s).values()]
        self.tensors = {DEFAULT: {k: parameter(base.store[k]) for k in (*keys, *base.trained)}}
        update_together(self.tensors[DEFAULT].values())

    def add(self, name: str, config: LoraConfig) -> dict[str, nn.Parameter]:
        """Make a new adapter.

        Raises:
            ConfigError: a name that is taken, a config that does not go beside the first adapter's, or a bias that trains.
        """
        if name in self.tensors:
            raise ConfigError(f"there is an adapter {name!r}; there are: {', '.join(self.tensors)}")
        if not name.isidentifier():
            raise ConfigError(f"adapter name {name!r}; accepted: letters, digits and _")
        first = self.bases[DEFAULT]
        if first.config.lora.bias != "none":
            raise ConfigError(
                f"adapter {name!r} beside one with bias={first.config.lora.bias!r}: a bias that trains is in the "
                'model\'s own place, as in PEFT; accepted: several adapters with bias="none"'
            )
        try:
            base = with_adapter(first, config)
        except ConfigError as error:
            raise ConfigError(f"adapter {name!r}: {error}") from error
        copies = {copy: new_copy(first, key) for copy, key in first.trained.items()}
        tensors = new_adapter(base, config, adapted_sites(base)) | copies
        base = replace(base, store=with_tensors(first.store, tensors, self.tensors[DEFAULT]))
        self.tensors[name], self.bases[name], self.shapes[name] = tensors, base, shape_of(base)
        update_together(tensors.values())
        return tensors

    def delete(self, name: str) -> None:
        del self.tensors[name], self.bases[name], self.shapes[name]

    def check(self, name: str) -> str:
        """``name``, if there is such an adapter.

        Raises:
            AdapterError: there is none.
        """
        if name not in self.tensors:
            raise AdapterError(f"no adapter {name!r}; there are: {', '.join(self.tensors)}")
        return name


def with_tensors(
    store: Store, tensors: dict[str, nn.Parameter], instead_of: dict[str, nn.Parameter]
) -> Store:
    """The same tensors with other adapter tensors; both show the first adapter in their tree."""
    other = Store(store.root)
    other.quantized = store.quantized
    rest = {key: tensor for key, tensor in store.items() if key not in instead_of}
    other.tensors = rest | dict(tensors)
    return other


def parameter(tensor: torch.Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor
