"""quantize: read each selected weight from its storage, every other one from its stored dtype."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from .graph.nodes import (
    CANONICAL,
    GROUPED,
    Emitter,
    StoredInputs,
    aten,
    cast,
    is_packed,
    placeholders,
    replace_other_uses,
    sites,
    weight_view,
)
from .graph.site import Site
from .graph.values import fake_mode, fake_value
from .schemes import Emission, emission_of, stored_parts, weight_node


def quantize(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Replace the dense weight of each selected site by its storage and the nodes that make it dense again.

    Which nodes those are is the scheme's to say (schemes/). The matmul stays an ordinary ``aten.linear`` on the
    dequantized weight. See Note [Where the gradient rule lives] in lower.py for why it is not one opaque op.

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
        rewrite = quantize_lookup if node.meta["site"].kind == "embedding" else quantize_site
        rewrite(graph, node, inputs, emission_of(config.quantization), config)
    graph.eliminate_dead_code()
    erase_dense_placeholders(graph, {n.meta["site"].weight for n in selected})
    modified = bool(selected)
    for placeholder in list(placeholders(graph)):
        modified |= read_in_stored_dtype(graph, placeholder)
    return PassResult(gm, modified)


def reads_storage(node: fx.Node) -> bool:
    """True if the product's weight (or the lookup's row) is made from a quantized weight's parts."""
    if node.target is aten.embedding.default:
        return False
    if node.target not in CANONICAL:
        return True  # a lookup, rewritten
    seen: set[Any] = set()
    todo: list[Any] = [node.args[1]]
    while todo:
        at = todo.pop()
        if is_packed(at):
            return True
        if at not in seen:
            seen.add(at)
            todo += at.all_input_nodes
    return False


def quantize_site(
    graph: fx.Graph, linear: fx.Node, inputs: StoredInputs, emission: Emission, config: Config
) -> None:
    """Rewrite one ``linear`` or ``grouped_linear``; inputs and result are cast where dtypes differ."""
    site: Site = linear.meta["site"]
    x, weight_arg, *rest = linear.args
    view = weight_view(weight_arg)
    assert view is not None
    act_dtype = linear.meta["val"].dtype
    dtype = config.compute_dtype
    target, args = linear.target, linear.args
    with graph.inserting_before(linear):
        parts = stored_parts(emission, graph, linear, site, inputs)
        new_x = cast(graph, x, dtype, f"{linear.name}_x")
        if new_x is not x:
            new_x.meta["input_of"] = site.name
        if linear.target in GROUPED:
            ends: Any = rest[0]
            shape, then = list(site.shape[1:]), Emitter(graph, linear)
            target, args = emission.grouped(new_x, parts, ends, shape, then)
        else:
            weight = weight_node(emission, parts, site, view, dtype, Emitter(graph, linear))
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
    linear.target, linear.args = target, args
    linear.meta["weight_read"] = view
    linear.meta["val"] = fake_value(graph, linear.target, linear.args, {})


def quantize_lookup(
    graph: fx.Graph, node: fx.Node, inputs: StoredInputs, emission: Emission, config: Config
) -> None:
    """Make only those rows of an embedding dense that are looked up.

    Before::

        %embed: f32[B, S, 48] = aten.embedding(%embed_weight, %input_ids)

    After (abridged)::

        %embed_nibble: i64[B, S, 48] = ...      # from %embed_weight_packed
        %embed_value: f32[B, S, 48] = aten.index(%quant_map, [%embed_nibble])
        %embed: f32[B, S, 48] = aten.mul(%embed_value, %embed_scale)
    """
    site: Site = node.meta["site"]
    ids: Any = node.args[1]
    with graph.inserting_before(node):
        parts = stored_parts(emission, graph, node, site, inputs)
        rows = emission.rows(ids, parts, site.in_features, inputs, Emitter(graph, node))
        # Rounded to the dtype in which the table was stored, as a dense table would have been.
        rows = cast(graph, rows, config.compute_dtype, f"{node.name}_rounded", like=node)
        result = cast(graph, rows, node.meta["val"].dtype, f"{node.name}_lookup", like=node)
    result.meta["site"] = site
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def erase_dense_placeholders(graph: fx.Graph, keys: set[str]) -> None:
    for node in list(placeholders(graph)):
        if node.meta.get("stored") in keys and not is_packed(node):
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
