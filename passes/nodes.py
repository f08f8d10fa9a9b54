"""What all passes share: the *site* mark, how nodes are born, how stored tensors enter a graph.

A graph holds no weights. Every tensor of the model comes in through a placeholder with
``meta["stored"]``, its key in the parameter store (the Hugging Face parameter name, or a name derived
from it such as ``....weight.absmax``). User inputs are placeholders with ``meta["input"]``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ..runtime.ops import ops as ops

aten = torch.ops.aten


@dataclass(frozen=True)
class Layout:
    """How a parameter becomes a weight that multiplies: ``p.reshape(view).permute(permute).reshape(shape)``.

    Attributes:
        view: a shape of the parameter's elements, in the order in which they are stored.
        permute: the order in which the weight takes those dimensions.
        shape: ``(out, in)``, or ``(experts, out, in)``.
    """

    view: tuple[int, ...]
    permute: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """True if the weight has the parameter's elements in the parameter's order."""
        return self.permute == tuple(range(len(self.permute)))

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The weight ``[(experts,) out, in]`` of a parameter."""
        return parameter.reshape(self.view).permute(self.permute).reshape(self.shape)

    def inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter, as ``view``, of a weight."""
        back = [self.permute.index(i) for i in range(len(self.permute))]
        return weight.reshape([self.view[i] for i in self.permute]).permute(back)


@dataclass(frozen=True)
class WeightView:
    """What the weight argument of a canonical product reads. ``meta["weight_view"]`` of the argument.

    Attributes:
        key: store key of the parameter.
        layout: the whole weight.
        rows: ``(start, stop)`` of the output features that are read, where not all are (a fused q/k/v weight).
        expert: which matrix of a stack of experts is read, where it is one (a loop over experts).
    """

    key: str
    layout: Layout
    rows: tuple[int, int] | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Site:
    """The verdict on one linear operation. ``meta["site"]`` of the canonical node holds it.

    Attributes:
        name: the module path as PEFT names it, e.g. ``model.layers.0.self_attn.q_proj``, or the parameter's
            own path where the module is not a linear (``model.layers.0.mlp.experts.gate_up_proj``).
        weight: key of the weight in the parameter store.
        op: how the model spelled the operation (``linear``, ``addmm``, ``einsum``, ...).
        layout: from the parameter to ``[(experts,) out, in]``; None where the operation was not recognised.
        kind: what holds the weight: ``linear``, ``conv`` (PEFT's module adapters), ``embedding``, or
            ``parameter`` (PEFT's ``target_parameters``).
        quantize: whether the weight goes to 4-bit storage.
        adapt: whether a LoRA branch is added.
        reason: why not, where ``quantize`` or ``adapt`` is False; empty otherwise.
        r, scaling, dropout: LoRA's rank, factor and dropout probability; meaningful if ``adapt``.
        swapped: PEFT's ``lora_A`` multiplies the parameter's last dimension, which is not the input here:
            the input meets ``lora_B`` first.
        flops: of one forward, at the sizes of the capture's example.
    """

    name: str
    weight: str
    op: str
    layout: Layout | None = None
    kind: str = "linear"
    quantize: bool = False
    adapt: bool = False
    reason: str = ""
    r: int = 0
    scaling: float = 1.0
    dropout: float = 0.0
    swapped: bool = False
    flops: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``; empty where the operation was not recognised."""
        return self.layout.shape if self.layout is not None else ()

    @property
    def experts(self) -> int:
        """Matrices in the weight; 0 for an ordinary ``[out, in]`` one."""
        return self.shape[0] if len(self.shape) == 3 else 0

    @property
    def out_features(self) -> int:
        return self.shape[-2] if self.shape else 0

    @property
    def in_features(self) -> int:
        return self.shape[-1] if self.shape else 0

    def lora_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of ``lora_A`` and ``lora_B`` as PEFT holds them.

        ``[r, in]`` and ``[out, r]``; for experts ``[experts * r, in]`` and ``[out, r * experts]``
        (``peft.tuners.lora.layer.ParamWrapper``); for a convolution with its window of ones behind.
        """
        out, inn = self.out_features, self.in_features
        if self.swapped:
            out, inn = inn, out
        n = self.r * max(self.experts, 1)
        window: tuple[int, ...] = ()
        if self.kind == "conv" and self.layout is not None:
            window = (1,) * (len(self.layout.view) - 2)
        return (n, inn, *window), (out, n, *window)


def is_flipped(view: WeightView, site: Site) -> bool:
    """True if this reader takes the transpose of what the site describes."""
    assert site.layout is not None
    return len(site.shape) == 2 and view.layout.permute != site.layout.permute


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
    node.meta["val"] = fake_value(graph, target, args, kwargs)
    for field in ("nn_module_stack", "stack_trace", "module"):
        if field in like.meta:
            node.meta[field] = like.meta[field]
    return node


def fake_value(graph: fx.Graph, target: Any, args: Any, kwargs: Any) -> Any:
    """What the op's fake kernel gives. Layers repeat, so the same question is answered once per capture.

    Fake tensors are descriptions that nobody writes to: nodes may share one. The answers are kept with the
    capture's fake mode, which they hold on to themselves: kept elsewhere they would outlive it.
    """
    mode = fake_mode(graph)
    known: dict[Any, Any] = vars(mode).setdefault("_qlora_fx_known", {})
    key = (target, str(fx.map_arg((args, kwargs), described)))
    found = known.get(key)
    if found is None:
        with mode, torch.no_grad():
            found = target(*fx.map_arg(args, _value), **fx.map_arg(kwargs, _value))
        known[key] = found
    return found


def described(node: fx.Node) -> str:
    """What a fake kernel can see of a node's value."""
    return str(pytree.tree_map(seen, node.meta["val"]))


def seen(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{val.dtype} {tuple(val.shape)} {val.stride()} {val.device}"
    return str(val)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator's call by the name in its schema, with the defaults of those not given."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
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


def placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    """Placeholders, which stand first in every graph."""
    for node in graph.nodes:
        if node.op != "placeholder":
            return
        yield node


CANONICAL = frozenset(
    {aten.linear.default, ops.grouped_linear.default, ops.grouped_linear_4bit.default}
)
"""After normalize only these multiply by a weight: ``linear``, and ``grouped_linear`` for stacks of experts."""


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
    """The nodes that carry a verdict, in graph order."""
    return (n for n in graph.nodes if "site" in n.meta)


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
