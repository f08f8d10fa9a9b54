"""What quantize and adapt share: the placeholders of a weight's storage, and casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...runtime.schemes.four_bit import NESTED_QUANT_MAP, layout
from ..graph.nodes import StoredInputs, aten, call, fake_mode, identifier
from ..graph.site import Site


def stored_parts(
    graph: fx.Graph, node: fx.Node, site: Site, inputs: StoredInputs, config: Any
) -> dict[str, fx.Node]:
    """Placeholders of a weight's storage, by part."""
    with fake_mode(graph):
        device = node.meta["val"].device
        vals = {
            key: torch.empty(size, dtype=dtype, device=device)
            for key, (size, dtype) in layout(
                site.shape, config.quantization, name=site.name
            ).items()
        }
    # The dense placeholder of the same key stays until all its readers are rewritten.
    packed = vals.pop("packed")
    name = f"{identifier(site.weight)}_packed"
    parts = {"packed": inputs.add(site.weight, packed, name=name, format="4bit")}
    for key, val in vals.items():
        parts[key] = inputs.add(stored_key(site.weight, key), val)
    return parts


def stored_key(weight: str, part: str) -> str:
    """Store key of one part of a quantized weight; the map of the nested absmax is shared by all."""
    return NESTED_QUANT_MAP if part == "nested_quant_map" else f"{weight}.{part}"


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
