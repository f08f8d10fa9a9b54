"""The captured graphs of a model with its adapters: which of them a call runs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

import torch

from ..compiler.programs import Programs
from ..weights.base import Base
from .adapter_rows import AdapterRows
from .named_adapters import DEFAULT, NamedAdapters

WHOLE = ""
"""The path of the model itself."""


class AdapterGraphs:
    """The captured graphs over one base: for adapters of each shape, of the whole model and of each part that is called for itself.

    Args:
        adapters: adapters of one shape run the same graphs.
        first: the whole model's with the first adapter.

    Attributes:
        of_shape: by what of an adapter is in them, and the path.
        of_rows: those in which each row of a batch has an adapter of its own, by path.
    """

    def __init__(self, adapters: NamedAdapters, first: Programs) -> None:
        self.adapters = adapters
        self.of_shape: dict[tuple[Hashable, str], Programs] = {
            (adapters.shapes[DEFAULT], WHOLE): first
        }
        self.of_rows: dict[str, Programs] = {}
        self._rows: AdapterRows | None = None
        self._settings = first

    def __iter__(self) -> Iterator[Programs]:
        return iter([*self.of_shape.values(), *self.of_rows.values()])

    def of(self, name: str, path: str = WHOLE) -> Programs:
        """Of an adapter; made empty where it is the first of its shape."""
        place = (self.adapters.shapes[name], path)
        if place not in self.of_shape:
            self.of_shape[place] = new = self._new(self.adapters.bases[name], path)
            new.use(self.adapters.tensors[self._in_use(name)])
        return self.of_shape[place]

    def _in_use(self, name: str) -> str:
        """The active adapter where that runs the same graphs as ``name``: without adapters those of the first are run."""
        active, shapes = self.adapters.active, self.adapters.shapes
        return active if shapes[active] == shapes[name] else name

    def rows(self, names: Sequence[str]) -> torch.Tensor:
        """Get ready for a batch whose rows have these adapters; the slot of each. See ``AdapterRows.take``."""
        if self._rows is None:
            self._rows = AdapterRows(self.adapters)
        before = self._rows.base
        slots = self._rows.take(names)
        if self._rows.base is not before:
            self.of_rows.clear()
        return slots

    def for_rows(self, path: str = WHOLE) -> Programs:
        """Of the batch that ``rows`` made ready for."""
        assert self._rows is not None
        if path not in self.of_rows:
            self.of_rows[path] = self._new(self._rows.base, path)
        return self.of_rows[path]

    def parts(self, name: str) -> dict[str, Programs]:
        """Of the parts that were called for themselves with an adapter of that shape, by path."""
        mine = self.adapters.shapes[name]
        return {path: p for (shape, path), p in self.of_shape.items() if shape == mine and path}

    def use(self, name: str) -> None:
        """Let all graphs that an adapter can run read its tensors."""
        self.of(name)
        for (shape, _), programs in self.of_shape.items():
            if shape == self.adapters.shapes[name]:
                programs.use(self.adapters.tensors[name])

    def forget_unused(self) -> None:
        """Give up what no adapter's shape is any more, after one was deleted."""
        left = set(self.adapters.shapes.values())
        self.of_shape = {place: p for place, p in self.of_shape.items() if place[0] in left}

    def _new(self, base: Base, path: str) -> Programs:
        if path != WHOLE:
            base = replace(base, skeleton=base.skeleton.submodel(path))
        like = self._settings
        return Programs(base, like.backend, like.memory_budget, like.cuda_graphs)
