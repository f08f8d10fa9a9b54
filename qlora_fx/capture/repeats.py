"""Blocks that repeat are walked once: what one of them did is written down again for each that is like it.

# Note [Walking one block of many]
torch.export takes some 5 ms for each operation of the model's Python, in every layer anew: a model of 48 layers takes half a
minute for a call of new arguments, and another for its generation. While a model is traced (``walked_once``), the first block of
each kind runs as ever, between two marks in the graph; one that is like it is a single node. ``written_out`` puts a copy of
the first one's nodes in the place of each such node, with the block's own weights. The result is the graph that the whole walk
would have given, name by name.

A block is like another if it would have done the same:
- its modules are of the same classes and hold equal attributes; those that hold the block's own place in its list were not
  looked at while the first one ran (``Place`` notices), but to say whose keys and values go into the cache;
- it is called with tensors of the same sizes, strides and dtypes, and with the same of everything else;
- the first one reads nothing but its arguments, its own weights and what the whole model holds, and writes nothing.
Whatever is not known to be so is walked.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree
from transformers import Cache, DynamicCache

from ..passes.graph.nodes import identifier
from .cache_layers import TracedLayer

library = torch.library.Library("qlora_fx", "FRAGMENT")
library.define("block_begins(Tensor[] inputs, int kind, str path) -> Tensor")
library.define("block_ends(Tensor[] outputs, Tensor begins, int kind) -> Tensor")
library.define(
    "block_again(Tensor[] inputs, Tensor[] like, Tensor ends, int kind, str path) -> Tensor[]"
)


def impl(name: str) -> Any:
    return torch.library.impl(library, name, "CompositeExplicitAutograd")


@impl("block_begins")
def _(inputs: Any, kind: int, path: str) -> Any:
    return inputs[0].new_empty(())


@impl("block_ends")
def _(outputs: Any, begins: torch.Tensor, kind: int) -> torch.Tensor:
    return begins.new_empty(())


@impl("block_again")
def _(inputs: Any, like: Any, ends: torch.Tensor, kind: int, path: str) -> list[torch.Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in like]


marks = torch.ops.qlora_fx


class Place:
    """A block's place in its list, for the time in which the first of a kind runs: notices when somebody looks."""

    def __init__(self, value: int) -> None:
        self.__dict__.update(value=value, seen=False)

    def look(self) -> int:
        self.__dict__["seen"] = True
        return int(self.__dict__["value"])

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        self.look()
        return int


def looks(name: str) -> Any:
    def method(self: Place, *args: Any) -> Any:
        return getattr(int, name)(self.look(), *(a.look() if type(a) is Place else a for a in args))

    return method


for _name in (
    *("index", "int", "float", "bool", "hash", "str", "repr", "format", "neg", "abs", "invert"),
    *("eq", "ne", "lt", "le", "gt", "ge", "divmod", "rdivmod", "pow", "rpow"),
    *(r + n for r in ("", "r") for n in ("add", "sub", "mul", "floordiv", "truediv", "mod")),
    *(r + n for r in ("", "r") for n in ("and", "or", "xor", "lshift", "rshift")),
):
    setattr(Place, f"__{_name}__", looks(f"__{_name}__"))


@dataclass
class Kind:
    """A block that ran, and what others must be like.

    Attributes:
        number: of the kind.
        index: the block's place in its list.
        places: attributes that hold it, by path and name.
        result: structure of what it returned, and its leaves that are no tensors.
        outputs: its tensors, and its rows of a cache behind them.
        ends: the mark.
    """

    number: int
    block: nn.Module
    index: int
    places: frozenset[tuple[str, str]]
    spec: pytree.TreeSpec
    constants: list[Any]
    outputs: list[torch.Tensor]
    ends: torch.Tensor
    rows: int


@dataclass
class Blocks:
    """One list of a model's blocks.

    Attributes:
        path: of the list.
        kinds: of those that ran, by how they were called; None where one cannot stand for others.
    """

    path: str
    modules: list[nn.Module]
    kinds: dict[Any, list[Kind]] = field(default_factory=dict)


@contextlib.contextmanager
def walked_once(model: nn.Module) -> Iterator[None]:
    """While it holds, blocks that are like one that ran are single nodes of the trace. Note [Walking one block of many]."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:
        for path, several in lists_of_blocks(model):
            blocks = Blocks(path, list(several))
            for index, module in enumerate(blocks.modules):
                walk = Walk(blocks, index, numbers)
                stack.enter_context(holding(module.__dict__, "forward", walk))
        yield


@contextlib.contextmanager
def holding(attributes: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    """While it holds, one attribute of an object is another."""
    before = attributes.get(name, MISSING)
    attributes[name] = value
    try:
        yield
    finally:
        if before is MISSING:
            del attributes[name]
        else:
            attributes[name] = before


MISSING: Any = object()


def lists_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules of one class that are in no other such list, with their paths."""
    found: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if any(path.startswith(f"{other}.") for other in found):
            continue
        different = len(set(map(id, module))) == len(module)
        replaced = any("forward" in vars(m) for child in module for m in child.modules())
        if len({type(m) for m in module}) == 1 and different and not replaced:
            found.append(path)
            yield path, module


class Walk:
    """The forward of one block."""

    def __init__(self, blocks: Blocks, index: int, numbers: Iterator[int]) -> None:
        self.blocks, self.index, self.numbers = blocks, index, numbers
        self.block = blocks.modules[index]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        call = Arguments.of(args, kwargs, self.index)
        if call is None or any(hooked(m) for m in self.block.modules()):
            return forward(self.block, *args, **kwargs)
        kinds = self.blocks.kinds.setdefault(call.key, [])
        for kind in kinds:
            if is_like(kind, self.block, self.index):
                return self.again(kind, call)
        return self.first(kinds, call)

    def first(self, kinds: list[Kind], call: Arguments) -> Any:
        """Run, between marks, and remember how."""
        number = next(self.numbers)
        places = own_places(self.blocks.modules, self.index)
        before = state_of(self.block)
        marked = {key: Place(self.index) for key in places}
        begins = marks.block_begins(call.tensors, number, f"{self.blocks.path}.{self.index}")
        with contextlib.ExitStack() as stack:
            for (path, name), place in marked.items():
                module = self.block.get_submodule(path)
                stack.enter_context(holding(module.__dict__, name, place))
            if call.cache is not None:
                stack.enter_context(taking_places(call.cache))
            args, kwargs = pytree.tree_unflatten(call.leaves, call.spec)
            result = type(self.block).forward(self.block, *args, **kwargs)
        leaves, spec = flat(result)
        rows = call.rows()
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        ends = marks.block_ends([*tensors, *rows], begins, number)
        constants = [None if isinstance(x, torch.Tensor) else Constant(x) for x in leaves]
        if (
            not any(place.__dict__["seen"] for place in marked.values())
            and state_of(self.block) == before
            and all(c is None or is_constant(c.value) or c.value is call.cache for c in constants)
            and call.is_untouched()
        ):
            outputs = [*tensors, *rows]
            kinds.append(
                Kind(
                    number,
                    self.block,
                    self.index,
                    places,
                    spec,
                    constants,
                    outputs,
                    ends,
                    len(rows),
                )
            )
        return result

    def again(self, kind: Kind, call: Arguments) -> Any:
        """One node, that stands for what the first of the kind did."""
        path = f"{self.blocks.path}.{self.index}"
        outputs = marks.block_again(call.tensors, kind.outputs, kind.ends, kind.number, path)
        count = len(outputs) - kind.rows
        call.take_rows(outputs[count:])
        of_tensors = iter(outputs)
        leaves = [
            next(of_tensors)
            if c is None
            else (call.cache if isinstance(c.value, Cache) else c.value)
            for c in kind.constants
        ]
        return pytree.tree_unflatten(leaves, kind.spec)


@dataclass(frozen=True)
class Constant:
    value: Any


def flat(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(value, is_leaf=lambda x: isinstance(x, Cache))


def is_constant(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


@dataclass
class Arguments:
    """What a block is called with.

    Attributes:
        key: what two calls must agree in.
        tensors: each once; those of its layer of the cache last.
        cache: the cache among the arguments; None without.
    """

    key: Any
    tensors: list[torch.Tensor]
    leaves: list[Any]
    spec: pytree.TreeSpec
    cache: DynamicCache | None
    index: int
    past: tuple[torch.Tensor, ...] = ()
    layers: int = 0

    @classmethod
    def of(cls, args: Any, kwargs: Any, index: int) -> Arguments | None:
        """None where a block could write to something or read what cannot be compared."""
        for value in (*args, *kwargs.values()):
            if not isinstance(value, (torch.Tensor, tuple, Cache)) and not is_constant(value):
                return None
        leaves, spec = flat((args, kwargs))
        caches = {id(x): x for x in leaves if isinstance(x, Cache)}
        if len(caches) > 1:
            return None
        cache = next(iter(caches.values()), None)
        past: tuple[torch.Tensor, ...] = ()
        if cache is not None:
            if type(cache) is not DynamicCache or "update" in vars(cache):
                return None
            layer = layer_of(cache, index)
            if layer is not None and (type(layer) is not TracedLayer or layer.rows):
                return None
            if layer is not None:
                past = layer.past if layer.start is None else (*layer.past, layer.start)
        tensors: dict[int, torch.Tensor] = {}
        described: list[Any] = []
        for x in (*leaves, *past):
            if isinstance(x, torch.Tensor):
                tensors.setdefault(id(x), x)
                described.append((list(tensors).index(id(x)), *description(x)))
            elif isinstance(x, Cache):
                described.append("cache")
            elif is_constant(x):
                described.append((type(x), x))
            else:
                return None
        state = (torch.is_grad_enabled(), torch.is_autocast_enabled())
        key = (tuple(described), len(past), spec, state)
        try:
            hash(key)
        except TypeError:
            key = (tuple(described), len(past), str(spec), state)
        if not tensors:
            return None
        layers = 0 if cache is None else len(cache.layers)
        return cls(key, list(tensors.values()), leaves, spec, cache, index, past, layers)

    def rows(self) -> tuple[torch.Tensor, ...]:
        """What the block has put into the cache."""
        layer = layer_of(self.cache, self.index)
        return () if layer is None else layer.rows

    def take_rows(self, rows: Any) -> None:
        """Let the cache hold these as the block's."""
        if not len(rows):
            return
        assert self.cache is not None
        while len(self.cache.layers) <= self.index:
            self.cache.layers.append(TracedLayer())
        layer = self.cache.layers[self.index]
        layer.rows = tuple(rows)

    def is_untouched(self) -> bool:
        """Whether the block has written to no layer of the cache but its own."""
        if self.cache is None:
            return True
        return len(self.cache.layers) in (self.layers, max(self.layers, self.index + 1))


def layer_of(cache: Any, index: int) -> Any:
    if cache is None or index >= len(cache.layers):
        return None
    return cache.layers[index]


@contextlib.contextmanager
def taking_places(cache: DynamicCache) -> Iterator[None]:
    """Let a block say by its place whose keys and values they are, without looking at it."""
    update = type(cache).update

    def by_place(keys: Any, values: Any, layer_idx: Any, *args: Any, **kwargs: Any) -> Any:
        if type(layer_idx) is Place:
            layer_idx = layer_idx.__dict__["value"]
        return update(cache, keys, values, layer_idx, *args, **kwargs)

    with holding(cache.__dict__, "update", by_place):
        yield


def description(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What Python can see of a traced tensor."""
    sizes, strides = (tuple(map(str, x)) for x in (tensor.shape, tensor.stride()))
    return (sizes, strides, str(tensor.dtype), str(tensor.device), tensor.requires_grad)


def hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


INSIDE = ("_parameters", "_buffers", "_modules", "forward")


def attributes(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in INSIDE}


def state_of(block: nn.Module) -> dict[Any, int]:
    """Which object each attribute of a block's modules is."""
    return {
        (path, name): id(value)
        for path, module in block.named_modules()
        for kind in (attributes(module), module._parameters, module._buffers, module._modules)
        for name, value in kind.items()
    }


def own_places(several: list[nn.Module], index: int) -> frozenset[tuple[str, str]]:
    """Attributes of the block that hold its place in the list, as another block's hold that one's."""
    found = set()
    for path, module in several[index].named_modules():
        for name, value in attributes(module).items():
            if type(value) is int and value == index and not name.startswith("_"):
                others = (attribute(b, path, name) for i, b in enumerate(several) if i != index)
                numbers = (i for i in range(len(several)) if i != index)
                if any(type(v) is int and v == i for i, v in zip(numbers, others, strict=True)):
                    found.add((path, name))
    return frozenset(found)


def attribute(block: nn.Module, path: str, name: str) -> Any:
    try:
        return block.get_submodule(path).__dict__.get(name)
    except AttributeError:
        return None


def is_like(kind: Kind, block: nn.Module, index: int) -> bool:
    """Whether a block would do what the first of a kind did, called in the same way."""
    first, other = dict(kind.block.named_modules()), dict(block.named_modules())
    if first.keys() != other.keys():
        return False
    for path, module in first.items():
        twin = other[path]
        if type(module) is not type(twin) or not same_tensors(module, twin):
            return False
        mine, its = attributes(module), attributes(twin)
        if mine.keys() != its.keys():
            return False
        for name, value in mine.items():
            if (path, name) in kind.places:
                if type(its[name]) is not int or its[name] != index:
                    return False
            elif not same_value(value, its[name]):
                return False
    return True


def same_tensors(module: nn.Module, other: nn.Module) -> bool:
    for mine, its in (
        (module._parameters, other._parameters),
        (module._buffers, other._buffers),
    ):
        if mine.keys() != its.keys():
            return False
        for a, b in zip(mine.values(), its.values(), strict=True):
            if (a is None) != (b is None) or (
                a is not None and b is not None and description(a) != description(b)
            ):
                return False
    return module._modules.keys() == other._modules.keys()


def same_value(value: Any, other: Any) -> bool:
    if value is other:
        return True
    if type(value) is not type(other) or isinstance(value, (torch.Tensor, nn.Module)):
        return False
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same_value(value[k], other[k]) for k in value)
    if isinstance(value, functools.partial):
        parts = [(v.func, v.args, v.keywords) for v in (value, other)]
        return same_value(*parts)
    if isinstance(value, (set, frozenset)):
        return all(map(is_constant, value)) and bool(value == other)
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(map(same_value, value, other))
    return is_constant(value) and bool(value == other)


class NotAlone(Exception):
    """A block that was to stand for others reads what is not its own, or writes."""


def written_out(graph: fx.Graph, keys: Mapping[str, str]) -> None:
    """Put what the first block of each kind did in the place of each node that stands for it, and take out the marks.

    Args:
        graph: flat, its stored placeholders all there.
        keys: store key of each parameter and buffer by its name.

    Raises:
        NotAlone: a block reads or writes what is not its own.
    """
    begins = {n.args[1]: n for n in graph.find_nodes(op="call_function", target=BEGINS)}
    if not begins:
        return
    stored = {n.meta["stored"]: n for n in graph.find_nodes(op="placeholder") if "stored" in n.meta}
    recordings: dict[Any, Recording] = {}
    for node in list(graph.nodes):
        if node.target is ENDS:
            recordings[node.args[2]] = Recording(graph, begins[node.args[2]], node)
    for node in graph.find_nodes(op="call_function", target=AGAIN):
        recordings[node.args[3]].play(node, keys, stored)
    for recording in recordings.values():
        recording.take_out()
    for placeholder in reversed(graph.find_nodes(op="placeholder")):
        if "stored" in placeholder.meta and not placeholder.users:
            graph.erase_node(placeholder)


BEGINS, ENDS, AGAIN = (
    getattr(marks, name).default for name in ("block_begins", "block_ends", "block_again")
)


class Recording:
    """What the first block of a kind did: the nodes between its marks."""

    def __init__(self, graph: fx.Graph, begins: fx.Node, ends: fx.Node) -> None:
        self.graph, self.begins, self.ends = graph, begins, ends
        self.path: Any = begins.args[2]
        self.nodes: list[fx.Node] = []
        self.checked = False
        at = begins.next
        while at is not ends:
            self.nodes.append(at)
            at = at.next

    def check(self) -> None:
        """Raise ``NotAlone`` for what another block would have to do otherwise."""
        own = {*self.nodes, *self.begins.args[0]}  # type: ignore[misc]
        for node in self.nodes:
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable and viewed(node.args[0]) not in self.nodes:
                raise NotAlone(f"{node.name} writes to what is not its own")
            for read in node.all_input_nodes:
                if read not in own and not is_number(read) and depends_on_weights(read):
                    raise NotAlone(f"{node.name} reads {read.name}")
        self.checked = True

    def play(self, again: fx.Node, keys: Mapping[str, str], stored: dict[str, fx.Node]) -> None:
        """The nodes once more, for the block at another path."""
        if not self.checked:
            self.check()
        inputs, _, _, _, path = again.args
        own = {key: name for name, key in keys.items() if name.startswith(f"{self.path}.")}
        rename = Rename(self.path, str(path))
        env: dict[fx.Node, Any] = dict(zip(self.begins.args[0], inputs, strict=True))  # type: ignore[arg-type]

        def of(node: fx.Node) -> Any:
            if node in env:
                return env[node]
            name = own.get(node.meta.get("stored", ""))
            if name is None:
                return node
            return stored[keys[f"{path}{name.removeprefix(self.path)}"]]

        with self.graph.inserting_before(again):
            for node in self.nodes:
                if not is_number(node):
                    args = fx.map_arg(node.args, of)
                    kwargs = fx.map_arg(node.kwargs, of)
                    new = self.graph.create_node(
                        node.op, node.target, args, dict(kwargs), name=rename.node(node.name)
                    )
                    new.meta = rename.meta(node.meta)
                    env[node] = new
        outputs: Any = self.ends.args[0]
        for item in list(again.users):
            item.replace_all_uses_with(of(outputs[item.args[1]]))
            self.graph.erase_node(item)
        self.graph.erase_node(again)

    def take_out(self) -> None:
        self.graph.erase_node(self.ends)
        self.graph.erase_node(self.begins)


class Rename:
    """From one block's path to another's."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new
        self.names = (identifier(old), identifier(new))

    def node(self, name: str) -> str:
        old, new = self.names
        return new + name.removeprefix(old) if name.startswith(f"{old}_") or name == old else name

    def path(self, path: str) -> str:
        is_own = path == self.old or path.startswith(f"{self.old}.")
        return self.new + path.removeprefix(self.old) if is_own else path

    def meta(self, meta: dict[str, Any]) -> dict[str, Any]:
        new = dict(meta)
        if "module" in new:
            new["module"] = self.path(new["module"])
        if new.get("nn_module_stack"):
            new["nn_module_stack"] = {
                key.replace(value[0], self.path(value[0])): (self.path(value[0]), *value[1:])
                for key, value in new["nn_module_stack"].items()
            }
        return new


def is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def viewed(node: Any) -> Any:
    """What a view is of."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.returns or schema.returns[0].alias_info is None:
            break
        node = node.args[0]
    return node


def depends_on_weights(node: fx.Node) -> bool:
    """Whether a value outside of a block is computed from weights; masks and tables of positions are not."""
    if node.op == "placeholder":
        return False
    todo, seen = [node], {node}
    while todo:
        for read in todo.pop().all_input_nodes:
            if read.op == "placeholder" and read.meta.get("parameter"):
                return True
            if read not in seen:
                seen.add(read)
                todo.append(read)
    return False
