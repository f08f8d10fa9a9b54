"""quantize: read each selected weight from 4-bit storage, every other one from its stored dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..runtime.storage import NESTED_BLOCKSIZE, NESTED_QUANT_MAP, layout
from .nodes import Site, StoredInputs, aten, call, fake_mode, identifier, placeholders, sites

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
        quantize_site(graph, node, inputs, config)
    graph.eliminate_dead_code()
    erase_dense_placeholders(graph, {n.meta["site"].weight for n in selected})
    modified = bool(selected)
    for placeholder in list(placeholders(graph)):
        modified |= read_in_stored_dtype(graph, placeholder)
    return PassResult(gm, modified)


def reads_storage(linear: fx.Node) -> bool:
    weight = linear.args[1]
    return isinstance(weight, fx.Node) and weight.target is bnb.dequantize_4bit.default


def quantize_site(graph: fx.Graph, linear: fx.Node, inputs: StoredInputs, config: Any) -> None:
    site: Site = linear.meta["site"]
    x, _, *rest = linear.args
    bias = rest[0] if rest else None
    act_dtype = linear.meta["val"].dtype
    dtype = config.compute_dtype
    with graph.inserting_before(linear):
        weight = dequantize(graph, linear, site, inputs, config)
        new_x = cast(graph, x, dtype, f"{linear.name}_x")
        if new_x is not x:
            new_x.meta["input_of"] = site.name
        new_bias = cast(graph, bias, dtype, f"{linear.name}_bias") if bias is not None else None
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
    linear.args = (new_x, weight) if new_bias is None else (new_x, weight, new_bias)
    with fake_mode(graph):
        linear.meta["val"] = aten.linear.default(*fx.map_arg(linear.args, lambda n: n.meta["val"]))


def dequantize(
    graph: fx.Graph, linear: fx.Node, site: Site, inputs: StoredInputs, config: Any
) -> fx.Node:
    """The nodes from storage to a dense ``[out, in]`` weight in the compute dtype."""
    q = config.quantization
    shape = (site.out_features, site.in_features)
    with fake_mode(graph):
        device = linear.meta["val"].device
        vals = {
            key: torch.empty(size, dtype=dtype, device=device)
            for key, (size, dtype) in layout(shape, q, name=site.name).items()
        }
    # The dense placeholder of the same key stays until all its readers are rewritten.
    packed = vals.pop("packed")
    name = f"{identifier(site.weight)}_packed"
    parts = {"packed": inputs.add(site.weight, packed, name=name, format="4bit")}
    for key, val in vals.items():
        parts[key] = inputs.add(stored_key(site.weight, key), val)
    name = linear.name
    if q.double_quant:
        absmax = call(
            graph,
            bnb.dequantize_blockwise.default,
            (
                parts["absmax"],
                parts["nested_absmax"],
                parts["nested_quant_map"],
                NESTED_BLOCKSIZE,
                torch.float32,
            ),
            name=f"{name}_absmax",
            like=linear,
        )
        absmax = call(
            graph,
            aten.add.Tensor,
            (absmax, parts["offset"]),
            name=f"{name}_absmax_offset",
            like=linear,
        )
    else:
        absmax = parts["absmax"]
    return call(
        graph,
        bnb.dequantize_4bit.default,
        (parts["packed"], absmax, q.blocksize, q.quant_type, list(shape), config.compute_dtype),
        name=f"{name}_dequant",
        like=linear,
    )


def stored_key(weight: str, part: str) -> str:
    """Store key of one part of a quantized weight; the map of the nested absmax is shared by all."""
    return NESTED_QUANT_MAP if part == "nested_quant_map" else f"{weight}.{part}"


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
