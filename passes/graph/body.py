"""Some nodes of a graph as a graph of its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from .nodes import aten, identifier, is_number
from .values import size_text, size_texts

INPUT_META = frozenset({"val", "stored", "stored_dtype", "format", "trainable"})
"""What an input of a body keeps of the node it stands for; marks such as ``site`` stay with that node."""
OF_FLAT_GRAPH = frozenset({"storage"})
"""Marks that hold nodes of the graph, and have no meaning in another one."""


class Body:
    """A run of nodes as a graph of its own; its inputs are what it reads from outside, in order of use.

    Symbolic sizes are read again from the body's own tensor inputs rather than passed, so that the body
    depends on tensors only.

    Args:
        nodes: in the order of their graph.
        prefix: the path of the block they come from; the body's keys and names are without it.
    """

    def __init__(self, nodes: Sequence[fx.Node], prefix: str) -> None:
        self.prefix = prefix
        self.graph = fx.Graph()
        self.inputs: list[fx.Node] = []
        self.outputs: list[fx.Node] = []
        self.env: dict[fx.Node, fx.Node] = {}
        inside = set(nodes)
        tensors = [n for n in nodes if not is_number(n)]
        # Tensors first: most numbers are sizes of theirs, and need no input that has nothing else to give.
        args = [arg for node in tensors for arg in node.all_input_nodes]
        for arg in sorted(args, key=is_number):
            self.collect(arg, inside)
        for node in tensors:
            self.copy(node)

    def finish(self, outputs: list[fx.Node]) -> None:
        """Return ``outputs``, nodes of the run, and drop what they do not need."""
        self.outputs = outputs
        values = tuple(self.env[n] for n in outputs)
        self.graph.output(values[0] if len(values) == 1 else values)
        self.graph.eliminate_dead_code()
        self.drop_unused_inputs()

    def collect(self, node: fx.Node, inside: set[fx.Node]) -> None:
        """Make ``node`` an input if it comes from outside; symbolic numbers are followed to a tensor."""
        if is_number(node):
            for arg in node.all_input_nodes:
                if not has_symbol(self.inputs, node):
                    self.collect(arg, inside)
            return
        if node in inside or node in self.env:
            return
        self.inputs.append(node)
        new = self.graph.create_node(
            "placeholder", self.local(node.name), name=self.local(node.name)
        )
        new.meta = {k: v for k, v in node.meta.items() if k in INPUT_META}
        if "stored" in node.meta:
            new.meta["body"] = node.meta["stored"].removeprefix(f"{self.prefix}.")
        self.env[node] = new

    def copy(self, node: fx.Node) -> fx.Node:
        args = fx.map_arg(node.args, self.translate)
        kwargs = fx.map_arg(dict(node.kwargs), self.translate)
        new = self.graph.create_node(node.op, node.target, args, kwargs, name=self.local(node.name))
        new.meta = {k: v for k, v in node.meta.items() if k not in OF_FLAT_GRAPH}
        self.env[node] = new
        return new

    def translate(self, node: fx.Node) -> Any:
        if node in self.env:
            return self.env[node]
        assert is_number(node), node
        expr = node.meta["val"].node.expr
        for outer in self.inputs:
            inner = self.env[outer]
            for dim, size in enumerate(getattr(inner.meta["val"], "shape", ())):
                if isinstance(size, torch.SymInt) and size.node.expr == expr:
                    new = self.graph.create_node(
                        "call_function", aten.sym_size.int, (inner, dim), name="size"
                    )
                    new.meta = {**node.meta, "module": self.prefix}
                    self.env[node] = new
                    return new
        return self.copy(node)

    def drop_unused_inputs(self) -> None:
        kept = []
        for outer in self.inputs:
            inner = self.env[outer]
            if inner.users:
                kept.append(outer)
            else:
                self.graph.erase_node(inner)
        self.inputs = kept

    def local(self, name: str) -> str:
        prefix = self.prefix.replace(".", "_")
        return identifier(name.removeprefix(f"{prefix}_")) if prefix else name

    def key(self) -> Hashable:
        return content(self.graph)


def content(graph: fx.Graph) -> Hashable:
    """Equal for two bodies that compute the same from inputs of the same types."""
    index = {node: i for i, node in enumerate(graph.nodes)}

    rows = []
    for node in graph.nodes:
        args = str(fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{index[n]}"))
        role = (node.meta.get("body"), node.meta.get("trainable"))
        rows.append(
            (
                node.op,
                str(node.target) if node.op == "call_function" else "",
                args,
                role if node.op == "placeholder" else None,
                signature(node.meta.get("val")),
            )
        )
    return tuple(rows)


def has_symbol(inputs: Iterable[fx.Node], number: fx.Node) -> bool:
    expr = number.meta["val"].node.expr
    return any(
        isinstance(size, torch.SymInt) and size.node.expr == expr
        for n in inputs
        if isinstance(n.meta["val"], torch.Tensor)
        for size in n.meta["val"].shape
    )


def signature(val: Any) -> Any:
    if isinstance(val, torch.Tensor):
        return (val.dtype, size_texts(val.shape), size_texts(val.stride()))
    if isinstance(val, (tuple, list)):
        return tuple(map(signature, val))
    return size_text(val)
