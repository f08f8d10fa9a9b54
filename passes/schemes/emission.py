"""What the twin of a storage scheme is: the nodes that read the parts which runtime/schemes makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from ...runtime.schemes import PACKED, Scheme, part_key
from ..graph.nodes import CASTS, Emitter, StoredInputs, aten, identifier
from ..graph.site import Layout, Site, WeightView
from ..graph.values import fake_empty

Parts = Mapping[str, fx.Node]


class Emission(Protocol):
    """The nodes of one scheme, with its settings. Node names are part of the printed graph.

    Attributes:
        scheme: whose parts are read.
        format: ``meta["format"]`` of the placeholders of packed bytes.
    """

    scheme: Scheme
    format: str

    def dense(self, parts: Parts, shape: list[int], dtype: torch.dtype, then: Emitter) -> fx.Node:
        """The dense weight ``shape = [out, in]`` in ``dtype`` from the parts of one matrix."""
        ...

    def grouped(
        self, x: fx.Node, parts: Parts, ends: fx.Node, shape: list[int], then: Emitter
    ) -> tuple[Any, tuple[Any, ...]]:
        """The operator, one of ``nodes.GROUPED``, and its arguments, that multiplies groups of rows by a stack.

        Args:
            x: ``[rows, in]``, sorted by expert.
            ends: where each expert's rows end.
            shape: ``[out, in]`` of one expert.
            then: for nodes before the product: without an operator of its own a scheme makes the stack dense and
                gives it to ``qlora_fx.grouped_linear``.
        """
        ...

    def rows(
        self, ids: fx.Node, parts: Parts, size: int, inputs: StoredInputs, then: Emitter
    ) -> fx.Node:
        """Rows ``ids`` of a stored ``[vocabulary, size]`` in float32; nothing else of it is made dense."""
        ...

    def product(
        self, x: Any, parts: Parts, bias: Any, lora: tuple[Any, Any, float], shape: list[int]
    ) -> tuple[Any, tuple[Any, ...]] | None:
        """The operator, and its arguments, that multiplies few rows by a stored ``shape = [out, in]``; None: there is none.

        Args:
            lora: ``lora_A``, ``lora_B`` and the scaling of a branch that it adds; None, None and 0 without.
        """
        ...

    def head(self, parts: Parts) -> tuple[list[fx.Node], int, str] | None:
        """``weight``, ``blocksize`` and ``quant_type`` of ``qlora_fx.linear_cross_entropy``; None: it reads the dense one."""
        ...


@dataclass(frozen=True)
class Storage:
    """What a dense weight was made from. ``meta["storage"]`` of its node, up to outline.

    Attributes:
        parts: nodes, by the scheme's names and in its order.
        emission: with the settings.
    """

    parts: Parts
    emission: Emission


def stored_parts(
    emission: Emission, graph: fx.Graph, node: fx.Node, site: Site, inputs: StoredInputs
) -> dict[str, fx.Node]:
    """Placeholders of a weight's parts, by name."""
    device = node.meta["val"].device
    parts: dict[str, fx.Node] = {}
    for name, part in emission.scheme.parts(site.shape, name=site.name).items():
        val = fake_empty(graph, part.shape, part.dtype, device)
        key = part_key(site.weight, name, part)
        if name == PACKED:
            # The dense placeholder of the same key stays until all its readers are rewritten.
            packed = f"{identifier(site.weight)}_packed"
            parts[name] = inputs.add(key, val, name=packed, format=emission.format)
        else:
            parts[name] = inputs.add(key, val)
    return parts


def weight_node(
    emission: Emission,
    parts: Parts,
    site: Site,
    view: WeightView,
    dtype: torch.dtype,
    then: Emitter,
) -> fx.Node:
    """The dense weight that a product reads through ``view``, in ``dtype``."""
    if view.expert is not None:
        shared = emission.scheme.shared()
        parts = {
            name: part
            if name in shared
            else then(aten.select.int, part, 0, view.expert, suffix=name)
            for name, part in parts.items()
        }
    weight = emission.dense(parts, list(site.shape[-2:]), dtype, then)
    weight.meta["storage"] = Storage(parts, emission)
    if view.expert is None and view.layout != site.layout:
        weight = change_layout(weight, site.layout, view.layout, then)
    if view.rows is not None:
        weight = then(aten.slice.Tensor, weight, 0, *view.rows, suffix="dequant_rows")
    return weight


def change_layout(weight: fx.Node, old: Layout, new: Layout, then: Emitter) -> fx.Node:
    """A weight stored for one reader as another reads it (a tied autoencoder's ``W`` and ``W.T``)."""
    if old.view == new.view and old.permute == new.permute[::-1] == (0, 1):
        return then(aten.t.default, weight, suffix="dequant_t")
    back = [old.permute.index(i) for i in range(len(old.permute))]
    steps = [
        (aten.reshape.default, [old.view[i] for i in old.permute]),
        (aten.permute.default, back),
        (aten.reshape.default, list(new.view)),
        (aten.permute.default, list(new.permute)),
        (aten.reshape.default, list(new.shape)),
    ]
    for target, arg in steps:
        weight = then(target, weight, arg, suffix="dequant_relaid")
    return weight


DENSE_BLOCKSIZE = 64
"""What ``qlora_fx.linear_cross_entropy`` is given with a dense weight, which has no blocks."""


def storage_of(weight: Any) -> tuple[list[fx.Node], int, str]:
    """A weight as ``qlora_fx.linear_cross_entropy`` takes it: its storage if it was made from one, else uncast."""
    at: Any = weight
    while at.op == "call_function" and "storage" not in at.meta:
        if at.target not in CASTS | {aten.view.default}:
            break
        at = at.args[0]
    made: Storage | None = at.meta.get("storage")
    read = made.emission.head(made.parts) if made is not None else None
    return read or ([at], DENSE_BLOCKSIZE, "")
