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

from .block_calls import BlockCall, Place, described, flat, taking_places
from .like_blocks import State, holding, is_constant, is_like, own_places

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
    """Lists of modules, some of them alike, that are in no other such list, with their paths.

    No two stages of a pyramid are alike: what repeats is in a list of its own in each.
    """
    found: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(found):
            blocks = list(module)
            if len(set(map(type, blocks))) == 1 and are_called(blocks) and some_are_alike(blocks):
                found += (f"{path}.",)
                yield path, blocks


def are_called(blocks: list[nn.Module]) -> bool:
    """Whether they are different modules, and what runs where the model calls them is the forward of their class."""
    different = len(set(map(id, blocks))) == len(blocks)
    replaced = any("forward" in vars(m) for block in blocks for m in block.modules())
    return different and not replaced and not isinstance(blocks[0], nn.ModuleList)


def some_are_alike(blocks: list[nn.Module]) -> bool:
    for i, block in enumerate(blocks[:-1]):
        places = own_places(blocks, i)
        if any(is_like(block, places, blocks[k], k) for k in range(i + 1, len(blocks))):
            return True
    return False


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
