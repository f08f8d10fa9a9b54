"""capture's second half: an exported program becomes one flat graph in our form."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..passes.graph.nodes import aten, identifier
from .repeated_blocks import AGAIN
from .written_out import written_out


class Flattener:
    """Copies an exported graph into a new one: our placeholders, our names, nested regions inlined.

    Args:
        stored: store key by placeholder name of the exported graph.
        names: argument name by placeholder name.
        dtypes: dtype in which each key is stored.
        parameters: keys of parameters; other keys are buffers and constants.
        keys: store key of each parameter and buffer, by name.

    Attributes:
        tainted: nodes that may have a gradient to pass on.
        with_grad: whether the model's Python is outside of ``torch.no_grad()`` where the graph is read.
        without_grad: nodes that were made inside.
        detached: what is read of them outside.
    """

    def __init__(
        self,
        stored: dict[str, str],
        names: dict[str, str],
        dtypes: Mapping[str, torch.dtype],
        parameters: Collection[str],
        keys: Mapping[str, str],
    ) -> None:
        self.parameters, self.keys = parameters, keys
        self.stored, self.names, self.dtypes = stored, names, dtypes
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.tainted: set[fx.Node] = set()
        self.with_grad = True
        self.without_grad: set[fx.Node] = set()
        self.detached: dict[fx.Node, fx.Node] = {}
        self.placed: set[str] = set()

    def run(self, exported: fx.GraphModule) -> fx.Graph:
        nodes = list(exported.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        self.repeated = tuple(f"{n.args[4]}." for n in nodes if n.target is AGAIN)
        for node in sorted(inputs, key=lambda n: n.name not in self.stored):
            self.placeholder(node)
        self.inline(exported)
        output = self.env[next(n for n in nodes if n.op == "output")]
        self.graph.output(tuple(output))
        written_out(self.graph, self.keys)
        self.graph.lint()
        return self.graph

    def placeholder(self, node: fx.Node) -> None:
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor):
            self.env[node] = val  # None, a flag or a number: already acted on while tracing
            return
        key = self.stored.get(node.name)
        if node.name not in self.names and not node.users and not self.is_repeated(key):
            return
        name = key if key is not None else self.names[node.name]
        new = self.graph.create_node("placeholder", identifier(name), name=identifier(name))
        new.meta["val"] = val
        if key is not None:
            self.placed.add(key)
            new.meta["stored"] = key
            new.meta["stored_dtype"] = self.dtypes.get(key, val.dtype)
            new.meta["parameter"] = key in self.parameters
        else:
            new.meta["input"] = name
        if is_differentiable(val) and (key is None or key in self.parameters):
            self.tainted.add(new)
        self.env[node] = new

    def is_repeated(self, key: str | None) -> bool:
        """Whether a block reads it that is written out later (written_out.py), and there is no placeholder of it yet."""
        return key is not None and key.startswith(self.repeated) and key not in self.placed

    def inline(self, gm: fx.GraphModule) -> None:
        for node in gm.graph.nodes:
            if node in self.env or node.op == "placeholder":
                continue
            if node.op == "get_attr":
                self.env[node] = getattr(gm, str(node.target))
            elif node.op == "output":
                self.env[node] = fx.map_arg(node.args[0], self.read)
            elif node.target is torch._C._set_grad_enabled:
                self.with_grad = bool(node.args[0])
            elif is_region(node):
                self.region(node)
            elif (
                node.args
                and isinstance(self.value(node.args[0]), (tuple, list))
                and (isinstance(node.args[0], fx.Node))
            ):
                self.env[node] = self.env[node.args[0]][node.args[1]]  # getitem of a region
            else:
                self.env[node] = self.copy(node)

    def region(self, node: fx.Node) -> None:
        """Inline a block with autocast disabled."""
        position = next(
            i for i, a in enumerate(node.args) if isinstance(self.value(a), fx.GraphModule)
        )
        body = self.value(node.args[position])
        for inner, outer in zip(
            body.graph.find_nodes(op="placeholder"), node.args[position + 1 :], strict=True
        ):
            self.env[inner] = self.read(outer) if isinstance(outer, fx.Node) else outer
        self.inline(body)
        self.env[node] = self.env[next(n for n in body.graph.nodes if n.op == "output")]

    def read(self, node: fx.Node) -> Any:
        """What a node reads: without gradient, if it was made under ``torch.no_grad()`` and is read outside."""
        value = self.env[node]
        if not self.with_grad or value not in self.without_grad or value not in self.tainted:
            return value
        if value not in self.detached:
            new = self.detached[value] = self.graph.create_node(
                "call_function", aten.detach.default, (value,), name=f"{value.name}_detach"
            )
            new.meta.update(value.meta)
        return self.detached[value]

    def value(self, arg: Any) -> Any:
        return self.env[arg] if isinstance(arg, fx.Node) else arg

    def copy(self, node: fx.Node) -> fx.Node:
        path = module_path(node)
        args = fx.map_arg(node.args, self.read)
        kwargs = fx.map_arg(node.kwargs, self.read)
        new = self.graph.create_node(
            node.op, node.target, args, kwargs, name=node_name(path, node.target)
        )
        for key in ("val", "nn_module_stack", "stack_trace"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        new.meta["module"] = path
        taints = node.target is AGAIN or any(n in self.tainted for n in new.all_input_nodes)
        if taints and is_differentiable(new.meta.get("val")):
            self.tainted.add(new)
        if not self.with_grad:
            self.without_grad.add(new)
        return new


def is_region(node: fx.Node) -> bool:
    # Positional: device_type, dtype, enabled, cache_enabled, body, *args. An enabled region changes dtypes.
    return "wrap_with_autocast" in str(node.target) and node.args[2] is False


def is_differentiable(val: Any) -> bool:
    """Whether it is, or has, a tensor that gradients can go through: sizes of one depend on no values."""
    return any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tree_leaves(val))


def module_path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else path


def node_name(path: str, target: Any) -> str:
    """``model.layers.0.q_proj`` and ``aten.linear`` -> ``model_layers_0_q_proj``; other ops append their name."""
    op = getattr(target, "overloadpacket", target)
    op_name = getattr(op, "__name__", str(op)).strip("_")
    if op_name == "linear" and path:
        return identifier(path)
    return identifier(f"{path}.{op_name}" if path else op_name)
