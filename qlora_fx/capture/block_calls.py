"""How a block of a model is called, and its place in its list. Note [Walking one block of many]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache

from .cache_layers import TracedLayer
from .like_blocks import description, holding, is_constant


class Place:
    """A block's place in its list, while the first of a kind runs: an integer that notices when somebody looks.

    Attributes:
        seen: whether somebody did.
    """

    def __init__(self, value: int) -> None:
        self.value, self.seen = value, False

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self.seen = True  # isinstance asks
        return int


def looking(name: str) -> Any:
    def method(self: Place, *others: Any) -> Any:
        numbers = [other.value if type(other) is Place else other for other in others]
        for place in (self, *(other for other in others if type(other) is Place)):
            place.seen = True
        return getattr(self.value, name)(*numbers)

    return method


for _name in (
    *(
        "index",
        "int",
        "float",
        "bool",
        "hash",
        "str",
        "repr",
        "format",
        "neg",
        "pos",
        "abs",
        "invert",
    ),
    *("eq", "ne", "lt", "le", "gt", "ge"),
    *(r + n for r in ("", "r") for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow")),
    *(r + n for r in ("", "r") for n in ("and", "or", "xor", "lshift", "rshift", "divmod")),
):
    setattr(Place, f"__{_name}__", looking(f"__{_name}__"))


@dataclass(frozen=True)
class BlockCall:
    """What a block is called with.

    Attributes:
        key: what two calls must agree in.
        tensors: each once; those of the block's layer of the cache last.
        cache: the cache among the arguments; None without.
        index: the block's layer of it.
    """

    key: Any
    tensors: list[torch.Tensor]
    cache: DynamicCache | None
    index: int

    @property
    def layers(self) -> list[Any]:
        return [] if self.cache is None else self.cache.layers

    def rows(self) -> tuple[torch.Tensor, ...]:
        """What the block has put into the cache."""
        return self.layers[self.index].rows if self.index < len(self.layers) else ()

    def take_rows(self, rows: list[torch.Tensor]) -> None:
        """Let the cache hold these as the block's."""
        if rows:
            self.layers.extend(TracedLayer() for _ in range(self.index + 1 - len(self.layers)))
            self.layers[self.index].rows = tuple(rows)

    def other_layers(self) -> list[Any]:
        """What the rest of the cache holds."""
        return [
            (i, *(id(t) for t in (layer, *layer.rows, layer.keys, layer.values)))
            for i, layer in enumerate(self.layers)
            if i != self.index
        ]

    def own(self, returned: Any) -> Any:
        return self.cache if isinstance(returned, Cache) else returned


def described(args: Any, kwargs: Any, index: int) -> BlockCall | None:
    """A block's call; None where the block could write to what it is given, or what that is cannot be compared."""
    if not all(map(is_comparable, (*args, *kwargs.values()))):
        return None
    leaves, spec = flat((args, kwargs))
    caches = {id(x): x for x in leaves if isinstance(x, Cache)}
    cache = next(iter(caches.values()), None)
    past: tuple[torch.Tensor, ...] = ()
    if cache is not None:
        if len(caches) > 1 or type(cache) is not DynamicCache or "update" in vars(cache):
            return None
        if any(type(layer) is not TracedLayer for layer in cache.layers):
            return None
        if index < len(cache.layers):
            layer = cache.layers[index]
            if layer.rows:
                return None
            past = layer.past if layer.start is None else (*layer.past, layer.start)
    order: dict[int, int] = {}
    tensors: list[torch.Tensor] = []
    said: list[Any] = [torch.is_grad_enabled(), autocast(), str(spec), len(past)]
    for x in (*leaves, *past):
        if not isinstance(x, torch.Tensor):
            said.append("cache" if isinstance(x, Cache) else (type(x), x))
            continue
        if id(x) not in order:
            order[id(x)] = len(tensors)
            tensors.append(x)
        said.append((order[id(x)], *description(x)))
    return BlockCall(tuple(said), tensors, cache, index) if tensors else None


def autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def is_comparable(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(is_comparable, value))
    return isinstance(value, (torch.Tensor, Cache)) or is_constant(value)


def flat(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(value, is_leaf=lambda x: isinstance(x, Cache))


@contextlib.contextmanager
def taking_places(cache: DynamicCache) -> Iterator[None]:
    """Let a block say by its place whose keys and values they are, without looking at it."""
    update = type(cache).update

    def by_place(keys: Any, values: Any, layer_idx: Any, *args: Any, **kwargs: Any) -> Any:
        number = layer_idx.value if type(layer_idx) is Place else layer_idx
        return update(cache, keys, values, number, *args, **kwargs)

    with holding(cache.__dict__, "update", by_place):
        yield
