"""How many multiplications and additions a product is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..linears.einsum import spelling
from .nodes import CANONICAL, args_of, parameter_behind, weight_like


def hint(size: Any) -> int:
    """A number for a size: its value in the capture's example; 0 where the data decide it."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else 0


def numel(node: Any) -> int:
    return math.prod(hint(s) for s in node.meta["val"].shape)


def flops(node: fx.Node) -> int:
    """Multiplications and additions of a product, 2 per weight and row, at the capture's example sizes."""
    if node.target in CANONICAL:
        out_size, in_size = (hint(s) for s in args_of(node)[1].meta["val"].shape[-2:])
        return 2 * numel(node.args[0]) // max(in_size, 1) * out_size * in_size
    if "conv" in spelling(node):
        size = [hint(s) for s in args_of(node)[1].meta["val"].shape]
        return 2 * numel(node) * math.prod(size[1:])
    inputs = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    weights = [n for n in inputs if weight_like(parameter_behind(n))]
    others = [n for n in inputs if n not in weights]
    rows = max(
        (numel(n) // max(hint(n.meta["val"].shape[-1]), 1) for n in others if n.meta["val"].dim()),
        default=1,
    )
    return 2 * rows * numel(weights[0]) if weights else 0
