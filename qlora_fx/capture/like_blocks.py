"""Whether a block of a model would do what another one did. Note [Walking one block of many]."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

MISSING: Any = object()
INSIDE = ("_parameters", "_buffers", "_modules", "forward")


@contextlib.contextmanager
def holding(attributes: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """While it holds, one attribute of an object is another."""
    before = attributes.get(name, MISSING)
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        if before is not MISSING:
            attributes[name] = before


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside tensors and modules."""
    return {k: v for k, v in module.__dict__.items() if k not in INSIDE}


def description(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What Python can see of a traced tensor."""
    sizes, strides = (tuple(map(str, x)) for x in (tensor.shape, tensor.stride()))
    return (sizes, strides, tensor.dtype, tensor.device, tensor.requires_grad)


def is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


class State:
    """What a block's modules hold at a time."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.held = self.now()

    def now(self) -> list[tuple[Any, ...]]:
        return [
            (path, name, value, inside(value))
            for path, module in self.block.named_modules()
            for kind in (attributes(module), module._parameters, module._buffers, module._modules)
            for name, value in sorted(kind.items(), key=lambda item: item[0])
        ]

    def is_unchanged(self) -> bool:
        """Whether they hold the same objects still."""
        now = self.now()
        return len(now) == len(self.held) and all(
            path == was_path
            and name == was_name
            and value is was
            and len(parts) == len(were)
            and all(a is b for a, b in zip(parts, were, strict=True))
            for (path, name, value, parts), (was_path, was_name, was, were) in zip(
                now, self.held, strict=True
            )
        )


def inside(value: Any) -> tuple[Any, ...]:
    """What a container holds."""
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else ()


def own_places(blocks: Sequence[nn.Module], index: int) -> frozenset[tuple[str, str]]:
    """Attributes of a block that hold its place among the blocks, by path and name: in another block they hold that one's."""
    found = set()
    for path, module in blocks[index].named_modules():
        for name, value in attributes(module).items():
            if type(value) is not int or value != index:
                continue
            others = ((i, attribute(b, path, name)) for i, b in enumerate(blocks) if i != index)
            if any(type(other) is int and other == i for i, other in others):
                found.add((path, name))
    return frozenset(found)


def attribute(block: nn.Module, path: str, name: str) -> Any:
    try:
        return block.get_submodule(path).__dict__.get(name)
    except AttributeError:
        return None


def is_like(
    first: nn.Module, places: frozenset[tuple[str, str]], block: nn.Module, index: int
) -> bool:
    """Whether a block's modules are those of another one.

    Args:
        first: the other one.
        places: attributes of it that hold its place.
        index: the block's place.
    """
    ours, its = (dict(b.named_modules(remove_duplicate=False)) for b in (first, block))
    return (
        list(ours) == list(its)
        and order(ours.values()) == order(its.values())
        and tensors_of(ours) == tensors_of(its)
        and all(
            is_same_module(module, its[path], {name for at, name in places if at == path}, index)
            for path, module in ours.items()
        )
    )


def order(objects: Any) -> list[int]:
    """Which of them are one object."""
    first: dict[int, int] = {}
    return [first.setdefault(id(x), len(first)) for x in objects]


def tensors_of(modules: dict[str, nn.Module]) -> Any:
    """Names and kinds of tensors, and which of them are one."""
    held = [
        (path, name, tensor)
        for path, module in modules.items()
        for kind in (module._parameters, module._buffers)
        for name, tensor in kind.items()
    ]
    told = [(p, n, None if t is None else (type(t), *description(t))) for p, n, t in held]
    return told, order(t for _, _, t in held if t is not None)


def is_same_module(module: nn.Module, twin: nn.Module, places: set[str], index: int) -> bool:
    ours, its = attributes(module), attributes(twin)
    return (
        type(module) is type(twin)
        and ours.keys() == its.keys()
        and all(
            type(its[name]) is int and its[name] == index
            if name in places
            else is_same(value, its[name])
            for name, value in ours.items()
        )
    )


def is_same(value: Any, other: Any) -> bool:
    """Whether Python cannot tell one from the other, as far as that is known."""
    if value is other:
        return True
    if type(value) is not type(other):
        return False
    if isinstance(value, dict):
        return list(value) == list(other) and all(is_same(value[k], other[k]) for k in value)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(is_same, value, other))
    if isinstance(value, (set, frozenset)):
        return all(map(is_constant, value)) and value == other
    if isinstance(value, functools.partial):
        return is_same(
            (value.func, value.args, value.keywords), (other.func, other.args, other.keywords)
        )
    return is_constant(value) and bool(value == other)
