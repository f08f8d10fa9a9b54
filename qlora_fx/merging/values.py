"""What each parameter of a model is with its adapter merged in, made one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..adapters import values_of
from ..checkpoints.conversion import Group
from ..checkpoints.load import matrix_layout
from ..checkpoints.open import Checkpoint
from ..errors import CheckpointError, ConfigError
from ..passes.graph.site import Layout, Site
from ..runtime.allocator import WORTH_IT, trim
from ..runtime.schemes.blocks import row_ranges
from ..weights.base import Base

MODES = ("dequantized", "base16", "requantized")
RowRanges = Callable[[tuple[int, ...]], Iterator[tuple[int, int]]]


class OriginalWeights:
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
            raise CheckpointError(f"{self.checkpoint.source.name!r} has no {name}")
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
    """The parameters of a base with its adapter in them.

    Args:
        mode: "dequantized" (the values that 4 bits stand for, plus the adapter: what was trained), "base16" (the
            original weights plus the adapter), or "requantized" (the first, quantized again).
        original: the original weights, for "base16".

    Attributes:
        errors: relative error (Frobenius) of each weight that was made so far, beside what was trained, by key.

    Raises:
        ConfigError: an adapted weight has other readers, for whom it would change too.
    """

    def __init__(self, base: Base, mode: str, original: OriginalWeights | None = None) -> None:
        self.base, self.mode, self.original_weights = base, mode, original
        self.model = base.skeleton.model
        dense = base.config.quantization.is_dense
        self.row_ranges: RowRanges = row_ranges if dense else base.scheme.row_ranges
        self.sites = base.quantized_sites()
        self.copies = {key: copy for copy, key in base.trained.items()}
        self.adapted: dict[str, list[Site]] = {}
        for site in base.sites.values():
            if site.adapt:
                self.adapted.setdefault(site.weight, []).append(site)
        self.errors: dict[str, float] = {}
        self.check_readers()

    def check_readers(self) -> None:
        names: dict[str, list[str]] = {}
        for name, key in self.base.skeleton.keys.items():
            names.setdefault(key, []).append(name)
        others = {
            s.weight: s.name for s in self.base.sites.values() if s.kind in ("reader", "embedding")
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
        key = self.base.skeleton.keys[name]
        old = self.model.get_parameter_or_buffer(name)
        shape = tuple(old.shape) if expert is None else tuple(old.shape[1:])
        site = self.sites.get(key) or next(iter(self.adapted.get(key, ())), None)
        if site is None:
            return self.untouched(name, key, expert)
        layout: Layout | None = site.layout
        if site.experts:
            one = matrix_layout(site.layout, site.experts)
            if expert is None and one is not None:
                out = torch.empty(shape, dtype=old.dtype, device=self.base.device)
                for i in range(site.experts):
                    out[i] = self.parameter(name, i)
                return out
            if expert is None:
                each = [self.matrix(name, site, i, old.dtype) for i in range(site.experts)]
                return site.layout.inverse(torch.stack(each)).reshape(shape).contiguous()
            layout = one
        if layout is None:
            assert expert is not None
            return self.parameter(name)[expert]
        value = self.matrix(name, site, expert, old.dtype)
        if value.nbytes >= WORTH_IT:
            trim()
        return layout.inverse(value).reshape(shape).contiguous()

    def untouched(self, name: str, key: str, expert: int | None) -> torch.Tensor:
        stored = self.base.store[self.copies.get(key, key)].detach()
        stored = stored.to(self.model.get_parameter_or_buffer(name).dtype)
        return stored if expert is None else stored[expert]

    def matrix(self, name: str, site: Site, expert: int | None, dtype: torch.dtype) -> torch.Tensor:
        """``[out, in]`` as it multiplies, in ``dtype``; made by rows, so that only the result is whole."""
        key, shape = site.weight, site.shape[-2:]
        out = torch.empty(shape, dtype=dtype, device=self.base.device)
        others: Iterator[torch.Tensor] = self.trained(site, expert)
        if key in self.sites and self.mode == "base16":
            others = self.with_adapter(self.original(name, site, expert), site, expert)
        elif key in self.sites and key in self.adapted and self.mode == "requantized":
            others = self.base.scheme.rows(self.quantize(site, expert), shape)
        distance = norm = 0.0
        ranges = self.row_ranges(shape)
        for (start, stop), value, true in zip(
            ranges, others, self.trained(site, expert), strict=True
        ):
            out[start:stop] = value
            distance += float((out[start:stop].float() - true).double().square().sum())
            norm += float(true.double().square().sum())
        error = (distance / norm) ** 0.5 if norm else 0.0
        self.errors[key] = max(self.errors.get(key, 0.0), error)
        return out

    def trained(self, site: Site, expert: int | None) -> Iterator[torch.Tensor]:
        """What the adapter was trained with, float32, by rows: the weight as held, plus the adapter."""
        if site.weight in self.sites:
            parts = self.parts(site.weight, expert)
            rows = self.base.scheme.rows(parts, site.shape[-2:])
        else:
            held = site.layout.of(self.base.store[site.weight].detach())
            rows = self.rows_of(held if expert is None else held[expert])
        return self.with_adapter(rows, site, expert)

    def original(self, name: str, site: Site, expert: int | None) -> Iterator[torch.Tensor]:
        """The original weight, float32, by rows."""
        assert self.original_weights is not None
        layout = matrix_layout(site.layout, site.experts) if expert is not None else site.layout
        if layout is None:
            assert expert is not None
            stack = site.layout.of(self.original_weights.read(name).to(self.base.device))
            return self.rows_of(stack[expert])
        return self.rows_of(
            layout.of(self.original_weights.read(name, expert).to(self.base.device))
        )

    def rows_of(self, matrix: torch.Tensor) -> Iterator[torch.Tensor]:
        for start, stop in self.row_ranges(tuple(matrix.shape)):
            yield matrix[start:stop].float().clone(memory_format=torch.contiguous_format)

    def with_adapter(
        self, rows: Iterator[torch.Tensor], site: Site, expert: int | None
    ) -> Iterator[torch.Tensor]:
        """Float32 rows with the adapters of the site's weight in them."""
        values = values_of(self.base.config.lora)
        for adapted in self.adapted.get(site.weight, ()):
            rows = values.merged(rows, self.base, adapted, expert)
        return rows

    def quantize(self, site: Site, expert: int | None) -> dict[str, torch.Tensor]:
        """New storage of one matrix."""
        builder = self.base.scheme.builder(site.shape[-2:], self.base.device)
        builder.add(0, (part.reshape(-1) for part in self.trained(site, expert)))
        return builder.parts

    def parts(self, key: str, expert: int | None) -> dict[str, torch.Tensor]:
        parts = self.base.store.parts(key)
        return parts if expert is None else self.base.scheme.matrix(parts, expert)

    def requantized(self, name: str) -> dict[str, torch.Tensor] | None:
        """New storage of an adapted weight in 4 bits; None where it stays as it is."""
        key = self.base.skeleton.keys[name]
        if key not in self.adapted or key not in self.sites:
            return None
        site = self.sites[key]
        if not site.experts:
            return self.quantize(site, None)
        return self.base.scheme.stack([self.quantize(site, i) for i in range(site.experts)])
