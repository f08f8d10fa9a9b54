"""What all passes share: the *site* mark, how nodes are born, how stored tensors enter a graph.

A graph holds no weights. Every tensor of the model comes in through a placeholder with
``meta["stored"]``, its key in the parameter store (the Hugging Face parameter name, or a name derived
from it such as ``....weight.absmax``). User inputs are placeholders with ``meta["input"]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten


@dataclass(frozen=True)
class Site:
    """The verdict on one linear operation. ``meta["site"]`` of the linear node holds it.

    Attributes:
        name: the module path of the weight, e.g. ``model.layers.0.self_attn.q_proj``.
        weight: key of the weight in the parameter store.
        op: how the model spelled the operation (``linear``, ``addmm``, ...).
        out_features, in_features: the canonical ``[out, in]`` shape; 0 where it is not known.
        transposed: True if the model stores the weight as ``[in, out]`` (Conv1D).
        quantize: whether the weight goes to 4-bit storage.
        adapt: whether a LoRA branch is added.
        reason: why not, where ``quantize`` or ``adapt`` is False; empty otherwise.
        r, scaling, dropout: LoRA's rank, factor and dropout probability; meaningful if ``adapt``.
    """

    name: str
    weight: str
    op: str
    out_features: int
    in_features: int
    transposed: bool = False
    quantize: bool = False
    adapt: bool = False
    reason: str = ""
    r: int = 0
    scaling: float = 1.0
    dropout: float = 0.0


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of the tensors in ``meta["val"]``; there is exactly one per capture."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            mode: FakeTensorMode = val.fake_mode  # type: ignore[attr-defined]
            return mode
    raise ValueError("graph has no tensor node with meta['val']")


def _value(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg


def call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    name: str,
    like: fx.Node,
) -> fx.Node:
    """Insert a ``call_function`` node whose ``meta["val"]`` is computed by the op's fake kernel.

    The caller sets the insertion point. ``like`` is the node the new one stands for: its
    ``nn_module_stack`` and ``stack_trace`` are copied, so that the new node belongs to the same module.
    """
    kwargs = kwargs or {}
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    with fake_mode(graph), torch.no_grad():
        node.meta["val"] = target(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))
    for field in ("nn_module_stack", "stack_trace", "module"):
        if field in like.meta:
            node.meta[field] = like.meta[field]
    return node


class StoredInputs:
    """The placeholders of a graph that read the parameter store, by key and format.

    Made once per pass: looking a key up in the graph each time is quadratic in the number of layers.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.nodes: dict[tuple[str, str], fx.Node] = {}
        self.last: fx.Node | None = None
        for node in placeholders(graph):
            if "stored" in node.meta:
                self.nodes[node.meta["stored"], node.meta.get("format", "")] = node
                self.last = node

    def add(self, key: str, val: torch.Tensor, *, name: str = "", format: str = "") -> fx.Node:
        """The placeholder for ``key``, made behind the other stored ones if there is none yet.

        ``val`` is a fake tensor of the stored shape and dtype.
        """
        found = self.nodes.get((key, format))
        if found is not None:
            return found
        name = name or identifier(key)
        if self.last is not None:
            context = self.graph.inserting_after(self.last)
        else:
            context = self.graph.inserting_before(next(iter(self.graph.nodes)))
        with context:
            node = self.graph.create_node("placeholder", name, name=name)
        node.meta.update(val=val, stored=key)
        if format:
            node.meta["format"] = format
        self.nodes[key, format] = self.last = node
        return node


def placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders, which stand first in every graph."""
    for node in graph.nodes:
        if node.op != "placeholder":
            return
        yield node


def linears(graph: fx.Graph) -> Iterable[fx.Node]:
    """Canonical linears, in graph order."""
    return graph.find_nodes(op="call_function", target=aten.linear.default)


def sites(graph: fx.Graph) -> Iterable[fx.Node]:
    """The nodes that carry a verdict, in graph order."""
    return (n for n in graph.nodes if "site" in n.meta)


def parameter_behind(node: Any) -> fx.Node | None:
    """The stored placeholder that ``node`` reads through views, casts and transposes only."""
    while isinstance(node, fx.Node):
        if node.op == "placeholder":
            return node if "stored" in node.meta else None
        if node.op != "call_function" or node.target not in VIEWS_AND_CASTS:
            return None
        node = node.args[0]
    return None


VIEWS_AND_CASTS = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.expand.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten._to_copy.default,
        aten.to.dtype,
        aten.numpy_T.default,
    }
)


def identifier(name: str) -> str:
    """``model.layers.0.q_proj.weight`` -> ``model_layers_0_q_proj_weight``."""
    text = "".join(c if c.isalnum() and c.isascii() else "_" for c in name).strip("_")
    return text if text and not text[0].isdigit() else f"n_{text}"
