"""A batch whose rows have adapters of their own: the adapters in stacks, one slot for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..adapters.initialize import adapted_sites
from ..errors import ConfigError, InputError
from ..passes.adapters.lora_rows import A, B
from ..passes.graph.site import Verdict
from ..runtime.parameter_store import Store
from ..weights.base import Base
from .named_adapters import DEFAULT, NamedAdapters

BASE = "__base__"
"""PEFT's name for rows without an adapter."""


class AdapterRows:
    """What graphs read whose rows choose among adapters.

    There are as many slots as one batch has needed, doubled as often as one needs more; the first is that of no adapter. Ranks
    are the largest of any adapter. Where slots and ranks stay, other names and other values need neither capture nor compilation.

    Args:
        adapters: those to choose among.

    Attributes:
        base: the model with stacks in the place of its adapter; another one whenever slots or ranks grow.
    """

    def __init__(self, adapters: NamedAdapters) -> None:
        self.adapters = adapters
        self.base = self._base(2)

    def take(self, names: Sequence[str]) -> torch.Tensor:
        """Put the adapters of these names into slots.

        Returns:
            The slot of each, int64 ``[names]``, on the model's device.

        Raises:
            InputError: there is no such adapter.
            ConfigError: adapters train tensors beside LoRA's.
        """
        known = self.adapters.bases
        if isinstance(names, str) or not all(isinstance(n, str) for n in names):
            raise InputError(
                f"adapter_names={names!r}; accepted: a list of names, one for each row"
            )
        unknown = sorted({n for n in names if n not in known and n != BASE})
        if unknown:
            raise InputError(
                f"adapter_names has {', '.join(map(repr, unknown))}; there are: {', '.join(known)}, and {BASE!r} for none"
            )
        if known[DEFAULT].trained:
            raise ConfigError(
                f"adapter_names with {', '.join(known[DEFAULT].trained.values())} trained beside the adapters "
                "(bias, modules_to_save); accepted: adapters that are LoRA's alone"
            )
        distinct = [n for n in dict.fromkeys(names) if n != BASE]
        slots = self.base.config.slots
        while slots < len(distinct) + 1:
            slots *= 2
        if slots != self.base.config.slots or self.base.verdicts != self._verdicts():
            self.base = self._base(slots)
        for slot, name in enumerate(distinct, 1):
            self._write(slot, name)
        found = [0 if n == BASE else 1 + distinct.index(n) for n in names]
        return torch.tensor(found, dtype=torch.int64, device=self.base.device)

    def _verdicts(self) -> dict[str, Verdict]:
        """Of each site the largest rank that an adapter has there."""
        found = dict(self.adapters.bases[DEFAULT].verdicts)
        for name, site in self.adapters.bases[DEFAULT].sites.items():
            ranks = [b.sites[name].r for b in self.adapters.bases.values() if b.sites[name].adapt]
            if ranks:
                found[name] = replace(site, adapt=True, r=max(ranks), scaling=1.0, dropout=0.0)
        return found

    def _base(self, slots: int) -> Base:
        first = self.adapters.bases[DEFAULT]
        store = Store(first.store.root)
        store.quantized = first.store.quantized
        own = self.adapters.tensors[DEFAULT]
        store.tensors = {key: t for key, t in first.store.items() if key not in own}
        base = replace(
            first, config=first.config.with_(slots=slots), verdicts=self._verdicts(), store=store
        )
        for site in adapted_sites(base):
            if site.experts:
                raise InputError(
                    f"adapter_names cannot be used with adapters of {site.name}: experts take tokens of all rows together; "
                    "accepted: adapters of linears that are no experts'"
                )
            for tensor in base.adapter.tensors(site).values():
                store.tensors[tensor.key] = torch.zeros(tensor.shape, device=base.device)
        return base

    @torch.no_grad()
    def _write(self, slot: int, name: str) -> None:
        """Let a slot hold an adapter's values of now: whoever changes them need not say so."""
        of, values = self.adapters.bases[name], self.adapters.tensors[name]
        places: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        scaled: dict[float, list[torch.Tensor]] = {}
        smaller: list[torch.Tensor] = []
        for site in adapted_sites(self.base):
            stacks = self.base.adapter.tensors(site)
            a, b = (self.base.store[stacks[role].key][slot] for role in (A, B))
            mine = of.sites[site.name]
            if not mine.adapt or mine.r < site.r:
                smaller += [a, b]
            if not mine.adapt:
                continue
            lora_a, lora_b = (values[t.key] for t in of.adapter.tensors(mine).values())
            places += [a[: mine.r], b[:, : mine.r]]
            sources += [lora_a.flatten(1), lora_b.flatten(1)]
            scaled.setdefault(mine.scaling, []).append(places[-1])
        if smaller:
            torch._foreach_zero_(smaller)
        torch._foreach_copy_(places, sources)
        for scaling, several in scaled.items():
            torch._foreach_mul_(several, scaling)
