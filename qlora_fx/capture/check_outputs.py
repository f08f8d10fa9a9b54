"""Whether a captured graph returns what the call asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..transformers_internals import attention_implementation
from .skeleton import Capture

OPTIONAL = ("output_attentions", "output_hidden_states", "output_router_logits")
"""Flags that ask for more outputs; a field of the output ends with the same words."""


def check_outputs(capture: Capture, values: Mapping[str, Any], model: Any) -> None:
    """Raise if a flag asks for outputs that the graph does not have.

    Args:
        values: the call's arguments by name.

    Raises:
        InputError: naming the flag.
    """
    flags = [name for name in OPTIONAL if values.get(name)]
    if not flags:
        return
    (returned,) = next(iter(capture.gm.graph.find_nodes(op="output"))).args
    leaves = [n.meta["val"] if isinstance(n, fx.Node) else n for n in returned]
    output = pytree.tree_unflatten(leaves, capture.out_spec)
    if not isinstance(output, Mapping):
        return  # a tuple has no names
    for flag in flags:
        wanted = flag.removeprefix("output_")
        fields = [value for name, value in output.items() if name.endswith(wanted)]
        if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(fields)):
            continue
        attention = attention_implementation(model.config)
        why = f" with attn_implementation={attention!r}" if wanted == "attentions" else ""
        more = (
            ", or a model that was loaded with attn_implementation='eager'"
            if wanted == "attentions" and attention != "eager"
            else ""
        )
        raise InputError(
            f"{flag}={values[flag]!r}: {type(model).__name__}{why} returns no {wanted}; accepted: "
            f"{flag}=False{more}"
        )
