"""What quantize and adapt share: the placeholders of a weight's storage, and casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...runtime.schemes import PACKED, part_key, scheme_of
from ..graph.nodes import StoredInputs, aten, call, fake_mode, identifier
from ..graph.site import Site


def stored_parts(
    graph: fx.Graph, node: fx.Node, site: Site, inputs: StoredInputs, config: Any
) -> dict[str, fx.Node]:
    """Placeholders of a weight's storage, by part."""
    device = node.meta["val"].device
    parts: dict[str, fx.Node] = {}
    for name, part in scheme_of(config.quantization).parts(site.shape, name=site.name).items():
        with fake_mode(graph):
            val = torch.empty(part.shape, dtype=part.dtype, device=device)
        key = part_key(site.weight, name, part)
        if name == PACKED:
            # The dense placeholder of the same key stays until all its readers are rewritten.
            packed = f"{identifier(site.weight)}_packed"
            parts[name] = inputs.add(key, val, name=packed, format="4bit")
        else:
            parts[name] = inputs.add(key, val)
    return parts


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
