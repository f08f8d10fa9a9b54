"""A flat graph in which blocks that were not walked are written out. Note [Walking one block of many]."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from ..passes.graph.blocks import call, numbered
from ..passes.graph.nodes import identifier, writes
from .repeated_blocks import AGAIN, BEGINS, ENDS


class NotAlone(Exception):
    """The first block of a kind reads or writes what is not its own, so that it cannot stand for others."""


def written_out(graph: fx.Graph, keys: Mapping[str, str]) -> None:
    """Put what the first block of each kind did in the place of each node that stands for it, and take out the marks.

    Args:
        graph: flat, with a placeholder for each weight of blocks that were not walked.
        keys: store key of each parameter and buffer, by name.

    Raises:
        NotAlone: nodes stand for a block that cannot stand for others.
    """
    begins = {n.args[1]: n for n in graph.find_nodes(op="call_function", target=BEGINS)}
    if not begins:
        return
    inputs = graph.find_nodes(op="placeholder")
    stored = {n.meta["stored"]: n for n in inputs if "stored" in n.meta}
    recordings: dict[Any, Recording] = {}
    for node in graph.find_nodes(op="call_function", target=ENDS):
        number = node.args[2]
        recordings[number] = Recording(graph, begins[number], node, keys)
    for node in graph.find_nodes(op="call_function", target=AGAIN):
        recordings[node.args[3]].play(node, stored)
    for recording in recordings.values():
        recording.take_out()
    for node in stored.values():
        if not node.users:
            graph.erase_node(node)


class Recording:
    """What the first block of a kind did: the nodes between its marks.

    Args:
        begins, ends: the marks.
        keys: store key of each parameter and buffer, by name.
    """

    def __init__(
        self, graph: fx.Graph, begins: fx.Node, ends: fx.Node, keys: Mapping[str, str]
    ) -> None:
        self.graph, self.begins, self.ends, self.keys = graph, begins, ends, keys
        self.path = str(begins.args[2])
        self.nodes: list[fx.Node] = []
        self.names: dict[str, str] | None = None
        node = begins.next
        while node is not ends:
            self.nodes.append(node)
            node = node.next

    @property
    def inputs(self) -> Any:
        """What the block read; nodes that stood for other blocks are theirs by the time it is played."""
        return self.begins.args[0]

    @property
    def outputs(self) -> Any:
        return self.ends.args[0]

    def prepare(self) -> dict[str, str]:
        """Names of the block's weights behind its path, by store key.

        Raises:
            NotAlone: another block would not do the same.
        """
        inside = set(self.nodes)
        own = inside.union(self.inputs)
        known = set().union(*(free_unbacked_symbols(n.meta["val"]) for n in self.inputs))
        for node in self.nodes:
            if writes(node) and viewed(node.args[0]) not in inside:
                raise NotAlone(f"{node.name} writes to what is not the block's own")
            if not free_unbacked_symbols(node.meta["val"]) <= known:
                raise NotAlone(f"{node.name} has sizes that depend on data")
            for read in node.all_input_nodes:
                if read not in own and not is_scalar(read) and depends_on_weights(read):
                    raise NotAlone(f"{node.name} reads {read.name}, which is not the block's own")
        prefix = f"{self.path}."
        return {
            k: name.removeprefix(prefix) for name, k in self.keys.items() if name.startswith(prefix)
        }

    @functools.cached_property
    def calls(self) -> Counter[str]:
        """How often the block called each module in it, by torch.export's key without the number of the call."""
        stacks = (node.meta.get("nn_module_stack") or {} for node in self.nodes)
        return Counter(numbered(key)[0] for key in set(itertools.chain(*stacks)))

    def play(self, again: fx.Node, stored: Mapping[str, fx.Node]) -> None:
        """The nodes once more, for the block that a node stands for.

        Args:
            stored: the placeholder of each weight, by store key.
        """
        if self.names is None:
            self.names = self.prepare()
        inputs: Any = again.args[0]
        rename = Renamed(self.path, str(again.args[4]))
        times = call(again, rename.new) - call(self.ends, self.path)
        later = {key: times * calls for key, calls in self.calls.items()}
        env: dict[fx.Node, fx.Node] = dict(zip(self.inputs, inputs, strict=True))

        def of(node: fx.Node) -> fx.Node:
            if node in env:
                return env[node]
            assert self.names is not None
            name = self.names.get(node.meta.get("stored", ""))
            return node if name is None else stored[self.keys[f"{rename.new}.{name}"]]

        with self.graph.inserting_before(again):
            for node in self.nodes:
                if is_scalar(node):
                    continue  # sizes are those of all blocks of the kind
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), of)
                name = rename.name(node.name)
                env[node] = self.graph.create_node(node.op, node.target, args, kwargs, name=name)
                env[node].meta = rename.meta(node.meta, later)
        for item in list(again.users):
            item.replace_all_uses_with(of(self.outputs[item.args[1]]))
            self.graph.erase_node(item)
        self.graph.erase_node(again)

    def take_out(self) -> None:
        self.graph.erase_node(self.ends)
        self.graph.erase_node(self.begins)


class Renamed:
    """Names and paths of one block as those of another one."""

    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def name(self, name: str) -> str:
        old = identifier(self.old)
        return identifier(self.new) + name.removeprefix(old) if is_in(name, old, "_") else name

    def at(self, path: str) -> str:
        return self.new + path.removeprefix(self.old) if is_in(path, self.old, ".") else path

    def meta(self, meta: Mapping[str, Any], later: Mapping[str, int]) -> dict[str, Any]:
        """What is said of a node.

        Args:
            later: by how many the calls of a module are later, by its key.
        """
        modules = {
            self.key(key, path, later): (self.at(path), *others)
            for key, (path, *others) in (meta.get("nn_module_stack") or {}).items()
        }
        new = dict(meta) | {"module": self.at(meta["module"])}
        return new | {"nn_module_stack": modules} if modules else new

    def key(self, key: str, path: str, later: Mapping[str, int]) -> str:
        if not is_in(path, self.old, "."):
            return key
        name, number = numbered(key)
        count = number + later[name]
        return name.removesuffix(path) + self.at(path) + (f"@{count}" if count else "")


def is_in(name: str, of: str, separator: str) -> bool:
    return name == of or name.startswith(f"{of}{separator}")


def is_scalar(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], (torch.SymInt, torch.SymFloat, torch.SymBool))


def viewed(node: Any) -> Any:
    """What a view is of."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.returns or schema.returns[0].alias_info is None:
            break
        node = node.args[0]
    return node


def depends_on_weights(node: fx.Node) -> bool:
    """Whether a value outside of a block is computed from parameters. A parameter that is read as it is belongs to all blocks."""
    todo, seen = [node], {node}
    while todo:
        for read in todo.pop().all_input_nodes:
            if read.op == "placeholder" and read.meta.get("parameter"):
                return True
            if read not in seen:
                seen.add(read)
                todo.append(read)
    return False
