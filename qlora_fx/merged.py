"""What each parameter of a model is with its adapter merged in, made one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .checkpoint import Checkpoint
from .conversion import Group
from .errors import CheckpointError, ConfigError
from .fill import quantized_sites
from .model import QLoRAModel
from .oracle import relative_error
from .passes.adapt import lora_keys
from .passes.site import Layout, Site
from .runtime.allocator import WORTH_IT, trim
from .runtime.storage import dequantize_weight, quantize_weight
from .runtime.store import QuantizedNode
from .stream import of_one

MODES = ("dequantized", "base16", "requantized")


class BaseWeights:
    """The original dense parameters of an opened checkpoint, by name; the last conversion is kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.groups = {n: g for g in checkpoint.groups for n in g.targets(checkpoint.model)}
        self.last: tuple[Group | None, dict[str, torch.Tensor]] = (None, {})

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The parameter, or one matrix of a stack of experts.

        Raises:
            CheckpointError: it is not there.
        """
        group = self.groups.get(name)
        if group is None:
            raise CheckpointError(f"{self.checkpoint.source.given!r} has no {name}")
        read, model = self.checkpoint.read, self.checkpoint.model
        if expert is not None and group.experts:
            return group.convert(read, model, expert)[name][0]
        if self.last[0] is not group:
            self.last = (None, {})
            self.last = (group, group.convert(read, model))
        whole = self.last[1][name]
        if group.single is not None:
            self.last = (None, {})
        return whole if expert is None else whole[expert]


class Merged:
    """The parameters of ``qmodel`` with its adapter in them.

    Args:
        mode: "dequantized" (the values that 4 bits stand for, plus the adapter: what was trained), "base16" (the
            original weights plus the adapter), or "requantized" (the first, quantized again).
        base: the original weights, for "base16".

    Attributes:
        errors: relative error (Frobenius) of each weight that was made so far, beside what was trained, by key.

    Raises:
        ConfigError: an adapted weight has other readers, for whom it would change too.
    """

    def __init__(self, qmodel: QLoRAModel, mode: str, base: BaseWeights | None = None) -> None:
        self.qmodel, self.mode, self.base = qmodel, mode, base
        self.model = qmodel._blueprint.model
        self.quantization = qmodel._config.quantization
        self.sites = quantized_sites(qmodel)
        self.adapted: dict[str, list[Site]] = {}
        for site in qmodel._sites.values():
            if site.adapt:
                self.adapted.setdefault(site.weight, []).append(site)
        self.errors: dict[str, float] = {}
        self.check_readers()

    def check_readers(self) -> None:
        names: dict[str, list[str]] = {}
        for name, key in self.qmodel._blueprint.keys.items():
            names.setdefault(key, []).append(name)
        others = {
            s.weight: s.name
            for s in self.qmodel._sites.values()
            if s.kind in ("reader", "embedding")
        }
        for key, sites in self.adapted.items():
            shared = names[key] if len(names[key]) > 1 else [others[key]] if key in others else []
            if shared:
                raise ConfigError(
                    f"{sites[0].name} is adapted, and its weight is shared ({', '.join(shared)}): merged, the adapter "
                    "would act on all of them. Accepted: adapters on weights with one reader"
                )

    # -- values -----------------------------------------------------------------------------------------

    def parameter(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The parameter (or one matrix of a stack, in the parameter's order) in the model's own dtype.

        In mode "requantized" the values that the new 4 bits stand for.
        """
        key = self.qmodel._blueprint.keys[name]
        old = self.model.get_parameter_or_buffer(name)
        shape = tuple(old.shape) if expert is None else tuple(old.shape[1:])
        site = self.sites.get(key) or next(iter(self.adapted.get(key, ())), None)
        if site is None:
            return self.untouched(name, key, expert)
        assert site.layout is not None
        if site.experts and expert is None:
            out = torch.empty(shape, dtype=old.dtype, device=self.qmodel.device)
            if of_one(site.layout, shape[0]) is not None:
                for i in range(shape[0]):
                    out[i] = self.parameter(name, i)
                return out
        value = self.weight(name, site, expert, old.dtype)
        layout = site.layout if expert is None else of_one(site.layout, old.shape[0])
        if layout is None:
            return self.parameter(name)[expert]  # type: ignore[index]
        return layout.inverse(value).reshape(shape).contiguous()

    def untouched(self, name: str, key: str, expert: int | None) -> torch.Tensor:
        stored = self.qmodel._store[key].detach()
        return stored if expert is None else stored[expert]

    def weight(self, name: str, site: Site, expert: int | None, dtype: torch.dtype) -> torch.Tensor:
        """``[(experts,) out, in]`` (of one expert ``[out, in]``) as it multiplies, in ``dtype``."""
        key = site.weight
        trained = self.trained(name, site, expert)
        if self.mode == "requantized" and key in self.sites:
            if key in self.adapted:
                parts = quantize_weight(trained, self.quantization)
            else:
                parts = self.parts(key, expert)
            value = dequantize_weight(parts, tuple(trained.shape), dtype, self.quantization)
        elif self.mode == "base16" and key in self.sites:
            assert self.base is not None
            original = self.base.read(name, expert).to(self.qmodel.device)
            assert site.layout is not None
            layout: Layout | None = site.layout
            if expert is not None:
                layout = of_one(site.layout, site.experts)
            assert layout is not None
            value = self.add(layout.of(original).float().contiguous(), key, expert).to(dtype)
        else:
            value = trained.to(dtype)
        self.errors[key] = max(self.errors.get(key, 0.0), error_of(value, trained))
        if trained.nbytes >= WORTH_IT:
            del trained
            trim()
        return value

    def trained(self, name: str, site: Site, expert: int | None) -> torch.Tensor:
        """What the adapter was trained with, float32: the weight as held, plus the adapter."""
        key = site.weight
        if key in self.sites:
            shape = site.shape if expert is None else site.shape[1:]
            held = dequantize_weight(
                self.parts(key, expert), shape, torch.float32, self.quantization
            )
        else:
            assert site.layout is not None
            stored = self.qmodel._store[key].detach()
            held = site.layout.of(stored).float()
            held = (held if expert is None else held[expert]).clone()
        return self.add(held, key, expert)

    def parts(self, key: str, expert: int | None) -> dict[str, torch.Tensor]:
        path, _, leaf = key.rpartition(".")
        node = self.qmodel._store.node(path)
        assert isinstance(node, QuantizedNode)
        parts = node.parts(leaf)
        if expert is None:
            return parts
        return {k: v if k == "nested_quant_map" else v[expert] for k, v in parts.items()}

    def add(self, weight: torch.Tensor, key: str, expert: int | None) -> torch.Tensor:
        """Add the adapters of ``key`` to a float32 weight, in place."""
        for site in self.adapted.get(key, ()):
            a, b = factors(site, self.qmodel._store)
            if site.experts and expert is not None:
                a, b = a[expert], b[expert]
            if weight.dim() == 2:
                weight.addmm_(b, a, alpha=site.scaling)
            else:
                weight.baddbmm_(b, a, alpha=site.scaling)
        return weight

    def requantized(self, name: str) -> dict[str, torch.Tensor] | None:
        """New storage of an adapted weight in 4 bits; None where it stays as it is."""
        key = self.qmodel._blueprint.keys[name]
        if key not in self.adapted or key not in self.sites:
            return None
        site = self.sites[key]
        if not site.experts:
            return quantize_weight(self.trained(name, site, None), self.quantization)
        each = [
            quantize_weight(self.trained(name, site, i), self.quantization)
            for i in range(site.experts)
        ]
        return {
            part: first if part == "nested_quant_map" else torch.stack([e[part] for e in each])
            for part, first in each[0].items()
        }


def factors(site: Site, store: Mapping[str, Any] | Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``[(experts,) r, in]`` and ``[(experts,) out, r]`` of an adapter: as ``passes.adapt.factors``, on tensors."""
    a, b = (store[key].detach().float() for key in lora_keys(site))
    a, b = a.reshape(a.shape[0], a.shape[1]), b.reshape(b.shape[0], b.shape[1])
    if site.experts:
        a = a.reshape(site.experts, site.r, a.shape[1])
        b = b.reshape(b.shape[0], site.r, site.experts).permute(2, 0, 1)
    if site.swapped:
        a, b = b.transpose(-2, -1), a.transpose(-2, -1)
    return a, b


def error_of(value: torch.Tensor, true: torch.Tensor, rows: int = 256) -> float:
    """``relative_error`` by rows, so that no float64 copy of a large weight is made."""
    value, true = value.reshape(-1, value.shape[-1]), true.reshape(-1, true.shape[-1])
    distance = norm = 0.0
    for v, t in zip(torch.split(value, rows), torch.split(true, rows), strict=True):
        size = float(t.double().norm())
        distance += (relative_error(v, t) * size) ** 2
        norm += size**2
    return (distance / norm) ** 0.5 if norm else 0.0
