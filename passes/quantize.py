"""quantize: read each selected weight from 4-bit storage, every other one from its stored dtype."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..runtime.ops import NESTED_BLOCKSIZE, whole_rows
from .graph.nodes import (
    CANONICAL,
    VIEWS,
    Emitter,
    StoredInputs,
    aten,
    fake_mode,
    fake_value,
    ops,
    placeholders,
    sites,
    weight_view,
)
from .graph.site import Layout, Site, WeightView
from .schemes.lookup import quantize_lookup
from .schemes.stored import cast, replace_other_uses, stored_parts

bnb = torch.ops.bitsandbytes


def quantize(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Replace the dense weight of each selected site by its storage and ``bitsandbytes::dequantize_4bit``.

    The matmul stays an ordinary ``aten.linear`` on the dequantized weight. See Note [Where the gradient
    rule lives] in lower.py for why it is not one opaque op.

    Before::

        %q_proj: f32[B, S, 6] = aten.linear(%x, %q_proj_weight)

    After::

        %q_proj_absmax: f32[1] = bitsandbytes.dequantize_blockwise(
            %q_proj_weight_absmax, %q_proj_weight_nested_absmax, %nested_quant_map, 256, f32)
        %q_proj_absmax_offset: f32[1] = aten.add(%q_proj_absmax, %q_proj_weight_offset)
        %q_proj_dequant: f32[6, 8] = bitsandbytes.dequantize_4bit(
            %q_proj_weight_packed, %q_proj_absmax_offset, 64, nf4, [6, 8], f32)
        %q_proj: f32[B, S, 6] = aten.linear(%x, %q_proj_dequant)
    """
    graph = gm.graph
    selected = [n for n in sites(graph) if n.meta["site"].quantize and not reads_storage(n)]
    inputs = StoredInputs(graph)
    for node in selected:
        if node.meta["site"].kind == "embedding":
            quantize_lookup(graph, node, inputs, config)
        else:
            quantize_site(graph, node, inputs, config)
    graph.eliminate_dead_code()
    erase_dense_placeholders(graph, {n.meta["site"].weight for n in selected})
    modified = bool(selected)
    for placeholder in list(placeholders(graph)):
        modified |= read_in_stored_dtype(graph, placeholder)
    return PassResult(gm, modified)


def reads_storage(node: fx.Node) -> bool:
    """True if the product's weight (or the lookup's row) comes from 4-bit storage."""
    if node.target is ops.grouped_linear_4bit.default:
        return True
    if node.target is aten.embedding.default:
        return False
    if node.target not in CANONICAL:
        return True  # a lookup, rewritten
    at: Any = node.args[1]
    while isinstance(at, fx.Node) and at.target in VIEWS and at.target is not operator.getitem:
        at = at.args[0]
    return isinstance(at, fx.Node) and at.target is bnb.dequantize_4bit.default


def quantize_site(graph: fx.Graph, linear: fx.Node, inputs: StoredInputs, config: Any) -> None:
    """Rewrite one ``linear`` or ``grouped_linear``; inputs and result are cast where dtypes differ."""
    site: Site = linear.meta["site"]
    x, weight_arg, *rest = linear.args
    view = weight_view(weight_arg)
    assert view is not None
    assert site.layout is not None
    act_dtype = linear.meta["val"].dtype
    dtype = config.compute_dtype
    is_grouped = linear.target is ops.grouped_linear.default
    with graph.inserting_before(linear):
        parts = stored_parts(graph, linear, site, inputs, config)
        new_x = cast(graph, x, dtype, f"{linear.name}_x")
        if new_x is not x:
            new_x.meta["input_of"] = site.name
        if is_grouped:
            q = config.quantization
            nested = [parts.get(k) for k in ("nested_absmax", "offset", "nested_quant_map")]
            shape = list(site.shape[1:])
            options = (shape, q.blocksize, q.quant_type)
            args = (new_x, parts["packed"], parts["absmax"], *nested, rest[0], *options)
        else:
            weight = dequantize(graph, linear, site, parts, view, config)
            bias = [cast(graph, b, dtype, f"{linear.name}_bias") for b in rest if b is not None]
            args = (new_x, weight, *bias)
    with graph.inserting_after(linear):
        result = linear
        if dtype != act_dtype:
            # Metadata of the linear changes below; the cast's is what the linear's was.
            result = graph.call_function(aten._to_copy.default, (linear,), {"dtype": act_dtype})
            result.meta = {k: v for k, v in linear.meta.items() if k not in ("site", "op")}
            result.meta["result_of"] = site.name
            result._rename(f"{linear.name}_result")
    if result is not linear:
        replace_other_uses(linear, result)
    linear.args = args
    linear.meta["weight_read"] = view
    if is_grouped:
        linear.target = ops.grouped_linear_4bit.default
    linear.meta["val"] = fake_value(graph, linear.target, linear.args, {})


def dequantize(
    graph: fx.Graph,
    linear: fx.Node,
    site: Site,
    parts: dict[str, fx.Node],
    view: WeightView,
    config: Any,
) -> fx.Node:
    """The nodes from storage to the dense ``[out, in]`` weight that the linear reads, in the compute dtype."""
    q = config.quantization
    assert site.layout is not None

    then = Emitter(graph, linear)
    if view.expert is not None:
        parts = {
            k: v if k == "nested_quant_map" else then(aten.select.int, v, 0, view.expert, suffix=k)
            for k, v in parts.items()
        }
    absmax = parts["absmax"]
    if q.double_quant:
        nested = (parts["nested_absmax"], parts["nested_quant_map"], NESTED_BLOCKSIZE)
        absmax = then(
            bnb.dequantize_blockwise.default, absmax, *nested, torch.float32, suffix="absmax"
        )
        absmax = then(aten.add.Tensor, absmax, parts["offset"], suffix="absmax_offset")
    shape = list(site.shape[-2:])
    rows = whole_rows(shape, q.blocksize)
    options = (q.blocksize, q.quant_type, rows, config.compute_dtype)
    weight = then(bnb.dequantize_4bit.default, parts["packed"], absmax, *options, suffix="dequant")
    if rows != shape:
        weight = then(aten.view.default, weight, shape, suffix="dequant_matrix")
    if view.expert is None and view.layout != site.layout:
        weight = relaid(weight, site.layout, view.layout, then)
    if view.rows is not None:
        weight = then(aten.slice.Tensor, weight, 0, *view.rows, suffix="dequant_rows")
    return weight


def relaid(weight: fx.Node, stored: Layout, wanted: Layout, then: Emitter) -> fx.Node:
    """A weight stored for one reader as another reads it (a tied autoencoder's ``W`` and ``W.T``)."""
    if stored.view == wanted.view and stored.permute == wanted.permute[::-1] == (0, 1):
        return then(aten.t.default, weight, suffix="dequant_t")
    back = [stored.permute.index(i) for i in range(len(stored.permute))]
    steps = [
        (aten.reshape.default, [stored.view[i] for i in stored.permute]),
        (aten.permute.default, back),
        (aten.reshape.default, list(wanted.view)),
        (aten.permute.default, list(wanted.permute)),
        (aten.reshape.default, list(wanted.shape)),
    ]
    for target, arg in steps:
        weight = then(target, weight, arg, suffix="dequant_relaid")
    return weight


def erase_dense_placeholders(graph: fx.Graph, keys: set[str]) -> None:
    for node in list(placeholders(graph)):
        if node.meta.get("stored") in keys and node.meta.get("format") != "4bit":
            graph.erase_node(node)


def read_in_stored_dtype(graph: fx.Graph, placeholder: fx.Node) -> bool:
    """Give a dense tensor its stored dtype, with a cast to the dtype it was captured in.

    An embedding casts the rows it looked up, not the table.
    """
    stored_dtype = placeholder.meta.get("stored_dtype")
    captured = placeholder.meta["val"]
    if stored_dtype is None or captured.dtype == stored_dtype:
        return False
    users = list(placeholder.users)
    with fake_mode(graph):
        placeholder.meta["val"] = captured.to(stored_dtype)
    for user in users:
        if user.target is aten.embedding.default and user.args[0] is placeholder:
            with fake_mode(graph):
                user.meta["val"] = user.meta["val"].to(stored_dtype)
            with graph.inserting_after(user):
                rows = cast(graph, user, captured.dtype, f"{user.name}_rows")
            replace_other_uses(user, rows)
    rest = [u for u in users if u.target is not aten.embedding.default]
    if rest:
        with graph.inserting_before(rest[0]):
            dense = cast(
                graph, placeholder, captured.dtype, f"{placeholder.name}_cast", like=rest[0]
            )
        for user in rest:
            user.replace_input_with(placeholder, dense)
    return True
