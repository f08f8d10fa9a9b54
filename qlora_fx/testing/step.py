"""One training step of a compiled model or of its oracle: what comes out, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..model import QLoRAModel
from .reference import Oracle


def step(
    run: QLoRAModel | Oracle, batch: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs by place and gradients by adapter name of one forward and backward of a model or an oracle."""
    if isinstance(run, Oracle):
        output = run(batch)
        adapters: dict[str, nn.Parameter] = run.adapters
    else:
        output = run(**batch)
        adapters = dict(run.adapter_parameters())
    found = leaves(output)
    return found, gradients(loss_of(output, found), adapters)


def gradients(loss: torch.Tensor, adapters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The gradient of each adapter, zero where it has none."""
    values = torch.autograd.grad(loss, list(adapters.values()), allow_unused=True)
    pairs = zip(adapters.items(), values, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}


def gradient_errors(
    grads: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Relative to each gradient's own norm, or to a millionth of the largest one where that is larger."""
    floor = 1e-6 * max((float(g.norm()) for g in true.values()), default=0.0)
    distances = {key: float((grads[key].double() - g).norm()) for key, g in true.items()}
    return {k: d / max(float(true[k].norm()), floor) if d else 0.0 for k, d in distances.items()}


def leaves(output: Any) -> dict[str, torch.Tensor]:
    """The floating-point tensors of an output, by place."""
    pairs, _ = pytree.tree_flatten_with_path(output)
    return {
        pytree.keystr(path).strip(".[]'\""): leaf
        for path, leaf in pairs
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    }


def loss_of(output: Any, found: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The model's loss, or a random projection of its outputs where it returns none.

    Args:
        found: ``leaves(output)``.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else None
    if isinstance(loss, torch.Tensor):
        return loss
    generator = torch.Generator().manual_seed(2)
    total = []
    for leaf in found.values():
        if leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator).to(leaf)
            total.append((leaf * weights).mean())
    return torch.stack(total).sum()
