"""What all passes share: how nodes are born, how stored tensors enter a graph.

A graph holds no weights. Every tensor of the model comes in through a placeholder with
``meta["stored"]``, its key in the parameter store (the Hugging Face parameter name, or a name derived
from it such as ``....weight.absmax``). User inputs are placeholders with ``meta["input"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Set
from typing import Any

import torch
from torch import fx

from ...runtime.ops import ops as ops
from .site import Layout, Site, Verdict, WeightView
from .values import fake_value

aten = torch.ops.aten


def is_number(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.SymInt)


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
    node.meta["val"] = fake_value(graph, target, args, kwargs)
    for field in ("nn_module_stack", "stack_trace", "module"):
        if field in like.meta:
            node.meta[field] = like.meta[field]
    return node


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """``node.args``, whose types fx gives as everything an argument could be; a pass knows which it is."""
    return node.args


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator's call by the name in its schema, with the defaults of those not given."""
    operator: Any = node.target
    schema = operator._schema
    names = [a.name for a in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


class Emitter:
    """Inserts nodes that stand for ``like``, where the graph's insertion point is.

    Called as ``emit(target, *args, suffix="sum", **kwargs)``: the node is named ``<name>_sum``.
    """

    def __init__(self, graph: fx.Graph, like: fx.Node, name: str = "") -> None:
        self.graph, self.like, self.name = graph, like, name or like.name

    def __call__(self, target: Any, *args: Any, suffix: str, **kwargs: Any) -> fx.Node:
        name = f"{self.name}_{suffix}"
        return call(self.graph, target, args, kwargs, name=name, like=self.like)


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


def is_packed(node: fx.Node) -> bool:
    """True for the placeholder of a quantized weight's bytes, which has the key of the dense weight."""
    return bool(node.meta.get("format"))


def is_from_cache(node: fx.Node) -> bool:
    """True for the placeholder of keys or values of earlier tokens, ``[tokens, batch, heads, size]``."""
    return bool(node.meta.get("past"))


def writes(node: fx.Node) -> bool:
    """Whether an operator changes what it reads, as its schema says."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def replace_other_uses(node: fx.Node, new: fx.Node) -> None:
    """Let all users of ``node`` but ``new`` itself read ``new``."""
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def cast(
    graph: fx.Graph, node: Any, dtype: torch.dtype, name: str, like: fx.Node | None = None
) -> fx.Node:
    """``node`` in ``dtype``; ``node`` itself if it already is."""
    if node.meta["val"].dtype == dtype:
        return node  # type: ignore[no-any-return]
    return call(
        graph, aten._to_copy.default, (node,), {"dtype": dtype}, name=name, like=like or node
    )


def placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders, which stand first in every graph."""
    for node in graph.nodes:
        if node.op != "placeholder":
            return
        yield node


GROUPED = frozenset({ops.grouped_linear.default, ops.grouped_linear_4bit.default})
"""Products of groups of rows with a stack of experts: dense, and read from each scheme's storage.

All have an argument ``ends``, where each group's rows end.
"""
FEW_ROWS = frozenset({ops.linear_4bit.default, ops.linear_dense.default})
"""What few_rows makes of products; a branch that they add is among their arguments."""
CANONICAL = GROUPED | {aten.linear.default}
"""After normalize only these multiply by a weight."""


def weight_view(node: Any) -> WeightView | None:
    """What a product's weight argument reads; None if it is not a view of a parameter."""
    if not isinstance(node, fx.Node):
        return None
    found: WeightView | None = node.meta.get("weight_view")
    if found is not None:
        return found
    if node.op == "placeholder" and "stored" in node.meta:
        shape = tuple(node.meta["val"].shape)
        return WeightView(node.meta["stored"], Layout(shape, tuple(range(len(shape))), shape))
    return None


def sites(graph: fx.Graph) -> Iterable[fx.Node]:
    """The nodes with a site, in graph order."""
    return (n for n in graph.nodes if "site" in n.meta)


def verdict_of(node: fx.Node) -> Verdict | None:
    found: Verdict | None = node.meta.get("site") or node.meta.get("skipped")
    return found


def verdicts(graph: fx.Graph) -> Iterator[Verdict]:
    """Sites and what was skipped, in graph order; one of each node."""
    return (found for node in graph.nodes if (found := verdict_of(node)) is not None)


def mark(node: fx.Node, verdict: Verdict) -> None:
    node.meta["site" if isinstance(verdict, Site) else "skipped"] = verdict


def parameter_behind(node: Any) -> fx.Node | None:
    """The stored placeholder that ``node`` reads through views, slices, casts and transposes only."""
    while isinstance(node, fx.Node):
        if node.op == "placeholder":
            return node if "stored" in node.meta else None
        if node.op != "call_function" or node.target not in VIEWS_AND_CASTS:
            return None
        node = node.args[0]
    return None


def weight_like(placeholder: fx.Node | None) -> bool:
    """True for a stored floating-point parameter (not a buffer) of two or more dimensions."""
    return (
        placeholder is not None
        and placeholder.meta["val"].dim() >= 2
        and placeholder.meta["val"].is_floating_point()
        and bool(placeholder.meta.get("parameter", True))
    )


CASTS = frozenset({aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device})


def uncast(node: Any, through: Set[Any] = CASTS) -> fx.Node:
    """What a value was before it was cast, or went ``through`` other operators."""
    while node.op == "call_function" and node.target in through:
        node = node.args[0]
    found: fx.Node = node
    return found


VIEWS = frozenset(
    {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.movedim.int,
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        operator.getitem,
        aten.contiguous.default,
        aten.clone.default,
        aten.detach.default,
        aten.alias.default,
        aten.numpy_T.default,
        aten.matrix_H.default,
        aten.mT.default,
    }
)
VIEWS_AND_CASTS = VIEWS | CASTS


def identifier(name: str) -> str:
    """``model.layers.0.q_proj.weight`` -> ``model_layers_0_q_proj_weight``."""
    text = "".join(c if c.isalnum() and c.isascii() else "_" for c in name).strip("_")
    return text if text and not text[0].isdigit() else f"n_{text}"
