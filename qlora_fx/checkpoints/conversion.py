"""Between a checkpoint's names and the model's: transformers' own conversions, planned on names alone.

transformers describes how a checkpoint's tensors become parameters by ``WeightRenaming`` and
``WeightConverter`` objects (``core_model_loading``): keys are renamed, experts merged, fused weights split. The
plan here is made with those objects, in the order in which ``convert_and_load_state_dict_in_model`` and
``revert_weight_conversion`` apply them; what is ours is when a tensor is read, and for how long it is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from ..transformers_internals import (
    Chunk,
    Concatenate,
    MergeModulelist,
    PrefixChange,
    SplitModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    conversions_used,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
    set_conversions_used,
)

Read = Callable[[str], torch.Tensor]


@dataclass
class Group:
    """Tensors that are converted together.

    Attributes:
        first: the name of the (first) result.
        transform: transformers' description of the conversion.
        sources: the tensors that go in, each with the pattern that it matched, in order.
        renamings: applied to the results' names.
    """

    first: str
    transform: Any
    sources: list[tuple[str, str]] = field(default_factory=list)
    renamings: list[Any] = field(default_factory=list)

    @property
    def single(self) -> str | None:
        """The one source, where nothing but its name changes."""
        return None if isinstance(self.transform, WeightConverter) else self.sources[0][0]

    @property
    def experts(self) -> int:
        """How many matrices can be converted one at a time; 0 where they cannot.

        True of a list that is merged into a stack and then only changed within each matrix.
        """
        operations = getattr(self.transform, "operations", None) or [None]
        first, *others = operations
        within = all(
            (isinstance(o, Concatenate) and o.dim > 0)
            or (isinstance(o, Transpose) and min(o.dim0, o.dim1) > 0)
            for o in others
        )
        counts = {len(members) for members in self.by_pattern().values()}
        if not (isinstance(first, MergeModulelist) and first.dim == 0 and within):
            return 0
        return counts.pop() if len(counts) == 1 else 0

    def split_experts(self, model: Any) -> int:
        """How many matrices of a stack are written apart and can be converted one at a time, in reverse.

        True of a stack that is changed within each matrix and then split along its first dimension.
        """
        *others, last = getattr(self.transform, "operations", None) or [None]
        within = all(
            (isinstance(o, Chunk) and o.dim > 0)
            or (isinstance(o, Transpose) and min(o.dim0, o.dim1) > 0)
            for o in others
        )
        if not (isinstance(last, SplitModulelist) and last.dim == 0 and within):
            return 0
        counts = {model.get_parameter_or_buffer(name).shape[0] for name, _ in self.sources}
        return int(counts.pop()) if len(counts) == 1 else 0

    def by_pattern(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, pattern in self.sources:
            found.setdefault(pattern, []).append(name)
        return found

    def sources_of(self, expert: int) -> list[str]:
        """The sources of one matrix of the stack."""
        return [members[expert] for members in self.by_pattern().values()]

    def targets(self, model: Any) -> list[str]:
        """Names of the results, as far as they are known without converting: patterns, put in."""
        if self.single is not None:
            return [self.first]
        first, *others = self.transform.target_patterns
        made = [self.first, *(self.first.replace(first, other) for other in others)]
        expected = model.state_dict()
        return [name for name in made if name in expected]

    def convert(self, read: Read, model: Any, expert: int | None = None) -> dict[str, torch.Tensor]:
        """The results by name; with ``expert``, of that matrix alone, as a stack of one.

        Each source is read when it is needed, and let go as soon as the conversion allows.
        """
        if self.single is not None:
            return {self.first: read(self.single)}
        transform = deepcopy(self.transform)
        chosen = None if expert is None else set(self.sources_of(expert))
        for name, pattern in self.sources:
            if chosen is None or name in chosen:
                transform.add_tensor(self.first, name, pattern, lambda name=name: read(name))
        made = transform.convert(self.first, model=model, config=model.config)
        return {
            renamed(name, self.renamings): value[0] if isinstance(value, list) else value
            for name, value in made.items()
        }


def plan(
    model: Any, names: Iterable[str], mapping: list[Any] | None = None
) -> tuple[list[Group], list[str]]:
    """How a checkpoint with tensors ``names`` becomes the model's parameters.

    Args:
        model: on the meta device, its tied weights not yet tied.
        mapping: conversions; default: the model's own.

    Returns:
        The groups, and the names that have no place in the model.
    """
    if mapping is None:
        mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    expected = model.state_dict()
    groups: dict[str, Group] = {}
    unexpected = []
    prefix = model.base_model_prefix
    for name in sorted(names, key=dot_natural_key):
        new, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if new not in expected and name in expected:
            new, pattern = rename_source_key(name, [], [], prefix, expected)
        if new not in expected:
            unexpected.append(name)
            continue
        transform = WeightRenaming(name, new) if pattern is None else by_pattern[pattern]
        group = groups.setdefault(new, Group(new, transform))
        group.sources.append((name, pattern or name))
    set_conversions_used(model, [m for m in mapping if m.was_used()])
    return list(groups.values()), unexpected


def plan_back(model: Any, names: Iterable[str]) -> list[Group]:
    """How parameters ``names`` of the model become a checkpoint as ``save_pretrained`` would name it.

    The reverse of the conversions that loading used, or, for a model that was not loaded, of the model's own
    without legacy ones.
    """
    conversions = conversions_used(model)
    if conversions is None:
        conversions = [
            c
            for c in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(c, PrefixChange)
        ]
    reverse = [c.reverse_transform() for c in conversions[::-1]]
    renamings = [c for c in reverse if isinstance(c, WeightRenaming)]
    converters = [c for c in reverse if isinstance(c, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    groups: dict[str, Group] = {}
    for name in sorted(names, key=dot_natural_key):
        new, pattern = rename_source_key(name, [], converters)
        if pattern is None:
            new = renamed(name, renamings)
            transform = WeightRenaming(name, new)
        else:
            transform = by_pattern[pattern]
        group = groups.setdefault(new, Group(new, transform))
        group.sources.append((name, pattern or name))
        if pattern is not None:
            group.renamings = renamings
    return list(groups.values())


def renamed(name: str, renamings: list[Any]) -> str:
    """The name after all renamings."""
    new: str = rename_source_key(name, renamings, [])[0]
    return new


def results(
    group: Group, model: Any, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, torch.Tensor]:
    """What a group makes of tensors with these shapes and dtypes, as meta tensors: nothing is read."""

    def read(name: str) -> torch.Tensor:
        shape, dtype = shapes[name]
        return torch.empty(shape, dtype=dtype, device="meta")

    return group.convert(read, model)
