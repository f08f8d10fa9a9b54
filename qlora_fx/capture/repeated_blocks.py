"""Blocks that repeat are walked once: what one of them did is written down again for each that is like it.

# Note [Walking one block of many]
torch.export takes some 5 ms for each operation of the model's Python, in every layer anew: a model of 48 layers takes half a
minute for a call with new arguments, and another for its generation. While a model is traced (``walked_once``), the first
block of each kind runs as ever, between two marks in the graph; one that is like it is a single node. ``written_out`` puts a
copy of the first one's nodes in the place of each such node, with the block's own weights: the graph that the whole walk
would have given, name by name.

A block is like another if it would have done the same:
- its modules are of the same classes and hold equal attributes (like_blocks.py). Those that hold the block's own place in its
  list were not looked at while the first one ran (``Place`` notices), but to say whose keys and values go into the cache;
- it is called with tensors of the same sizes, strides and dtypes, and with the same of everything else;
- the first one changed no attribute, wrote to nothing but what it had made and its own layer of the cache, and read nothing
  but its arguments, its own weights, and what depends on no weights (masks, tables of positions).
Whatever is not known to be so is walked. What would go unnoticed is Python that keeps count somewhere else, in a global that each block
changes. That the graphs are equal is a test for every type of model (tests/qlora_fx/test_repeated_blocks.py).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache

from .cache_layers import TracedLayer
from .like_blocks import State, description, holding, is_constant, is_like, own_places

library: Any = torch.library.Library("qlora_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
library.define("block_begins(Tensor[] inputs, int kind, str path) -> Tensor")
library.define("block_ends(Tensor[] outputs, Tensor begins, int kind) -> Tensor")
library.define(
    "block_again(Tensor[] inputs, Tensor[] like, Tensor ends, int kind, str path) -> Tensor[]"
)


@torch.library.impl(library, "block_begins", "CompositeExplicitAutograd")
def _begins(inputs: list[torch.Tensor], kind: int, path: str) -> torch.Tensor:
    return inputs[0].new_empty(())


@torch.library.impl(library, "block_ends", "CompositeExplicitAutograd")
def _ends(outputs: list[torch.Tensor], begins: torch.Tensor, kind: int) -> torch.Tensor:
    return begins.new_empty(())


@torch.library.impl(library, "block_again", "CompositeExplicitAutograd")
def _again(
    inputs: list[torch.Tensor], like: list[torch.Tensor], ends: torch.Tensor, kind: int, path: str
) -> list[torch.Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in like]


marks = torch.ops.qlora_fx
BEGINS, ENDS = marks.block_begins.default, marks.block_ends.default
AGAIN = marks.block_again.default


@contextlib.contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """While it holds, blocks that are like one that ran are single nodes of the trace. Note [Walking one block of many]."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:
        for path, blocks in lists_of_blocks(model):
            several = Blocks(path, blocks, numbers)
            for index, block in enumerate(blocks):
                walk = Walk(several, block, index)
                stack.enter_context(holding(block.__dict__, "forward", walk))
        yield


def lists_of_blocks(model: nn.Module) -> Iterator[tuple[str, list[nn.Module]]]:
    """Lists of modules of one class that are in no other such list, with their paths."""
    found: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2 or path.startswith(found):
            continue
        blocks = list(module)
        different = len(set(map(id, blocks))) == len(blocks)
        replaced = any("forward" in vars(m) for block in blocks for m in block.modules())
        if len(set(map(type, blocks))) == 1 and different and not replaced:
            found += (f"{path}.",)
            yield path, blocks


@dataclass
class Blocks:
    """One list of a model's blocks.

    Attributes:
        path: of the list.
        numbers: for kinds, one sequence for the model.
        kinds: of those that ran and can stand for others, by how they were called.
    """

    path: str
    modules: list[nn.Module]
    numbers: Iterator[int]
    kinds: dict[Any, list[Kind]] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """A block that ran, and what it did.

    Attributes:
        number: of the kind.
        places: attributes that hold the block's place in its list, by path and name.
        spec: structure of what it returned.
        constants: of its leaves; None where there is a tensor.
        outputs: its tensors, and its rows of the cache behind them.
        rows: how many these are.
        ends: the mark behind it.
    """

    number: int
    block: nn.Module
    places: frozenset[tuple[str, str]]
    spec: pytree.TreeSpec
    constants: list[Constant | None]
    outputs: list[torch.Tensor]
    rows: int
    ends: torch.Tensor


@dataclass(frozen=True)
class Constant:
    """What a block returned that is no tensor."""

    value: Any


class Walk:
    """The forward of one block."""

    def __init__(self, blocks: Blocks, block: nn.Module, index: int) -> None:
        self.blocks, self.block, self.index = blocks, block, index
        self.path = f"{blocks.path}.{index}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = functools.partial(
            type(self.block).forward, as_called(self.block), *args, **kwargs
        )
        call = described(args, kwargs, self.index)
        hooks = (m._forward_hooks or m._forward_pre_hooks for m in self.block.modules())
        if call is None or any(hooks):
            return forward()
        kinds = self.blocks.kinds.setdefault(call.key, [])
        for kind in kinds:
            if is_like(kind.block, kind.places, self.block, self.index):
                return self.again(kind, call)
        return self.first(kinds, call, forward)

    def first(self, kinds: list[Kind], call: BlockCall, forward: Callable[[], Any]) -> Any:
        """Run, between marks, and remember how."""
        number = next(self.blocks.numbers)
        places = own_places(self.blocks.modules, self.index)
        marked = {key: Place(self.index) for key in places}
        state, others = State(self.block), call.other_layers()
        begins = marks.block_begins(call.tensors, number, self.path)
        with contextlib.ExitStack() as stack:
            for (path, name), place in marked.items():
                module = self.block.get_submodule(path)
                stack.enter_context(holding(module.__dict__, name, place))
            if call.cache is not None:
                stack.enter_context(taking_places(call.cache))
            result = forward()
        leaves, spec = flat(result)
        constants = [None if isinstance(x, torch.Tensor) else Constant(x) for x in leaves]
        rows = call.rows()
        outputs = [*(x for x in leaves if isinstance(x, torch.Tensor)), *rows]
        ends = marks.block_ends(outputs, begins, number)
        returned = (c.value for c in constants if c is not None)
        if (
            not any(place.seen for place in marked.values())
            and state.is_unchanged()
            and all(is_constant(value) or value is call.cache for value in returned)
            and others == call.other_layers()
        ):
            kind = Kind(number, self.block, places, spec, constants, outputs, len(rows), ends)
            kinds.append(kind)
        return result

    def again(self, kind: Kind, call: BlockCall) -> Any:
        """One node, that stands for what the first of the kind did."""
        outputs = marks.block_again(call.tensors, kind.outputs, kind.ends, kind.number, self.path)
        call.take_rows(outputs[len(outputs) - kind.rows :])
        tensors = iter(outputs)
        leaves = [next(tensors) if c is None else call.own(c.value) for c in kind.constants]
        return pytree.tree_unflatten(leaves, kind.spec)


def as_called(block: nn.Module) -> nn.Module:
    """The object whose call is running: export's stand-in for a block, which knows the path of what it holds, or the block."""
    frame = sys._getframe(2)
    for _ in range(3):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and vars(owner) is vars(block):
            return owner
        if frame.f_back is None:
            break
        frame = frame.f_back
    return block


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
