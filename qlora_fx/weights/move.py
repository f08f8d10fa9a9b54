"""Fill the store of a base from a real model, or with single tensors as they arrive."""

from __future__ import annotations

import torch
from torch import nn

from ..runtime.parameter_store import QuantizedShape, Store
from .base import Base


def move_weights(model: nn.Module, base: Base) -> None:
    """Move every tensor of ``model`` to the store; quantize selected weights one at a time.

    Nothing here keeps a reference to a dense weight once its storage exists.
    """
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, key in base.skeleton.keys.items():
        path, _, leaf = name.rpartition(".")
        places.setdefault(key, []).append((model.get_submodule(path), leaf))
    by_weight = base.quantized_sites()
    for key, where in places.items():
        module, leaf = where[0]
        site = by_weight.get(key)
        tensor = getattr(module, leaf)
        if site is not None:
            dense = site.layout.of(tensor.detach())
            parts = base.scheme.quantize(dense)
            base.store.add_quantized(
                key, parts, QuantizedShape(site.shape, tensor.dtype, base.scheme)
            )
            for owner, name in where:
                owner._parameters[name] = nn.Parameter(
                    torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"),
                    requires_grad=False,
                )
            del tensor, dense, parts
        else:
            add_dense(base.store, key, tensor, module, leaf)
    add_tables(base)


def add_dense(store: Store, key: str, tensor: torch.Tensor, module: nn.Module, leaf: str) -> None:
    """Hold a tensor as what ``module.leaf`` is: a parameter or a buffer."""
    if isinstance(getattr(module, leaf), nn.Parameter):
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        store.add(key, tensor.requires_grad_(False))
    else:
        persistent = leaf not in module._non_persistent_buffers_set
        store.add(key, tensor, persistent=persistent)


def add_tables(base: Base) -> None:
    """Hold the scheme's constants where single rows are looked up with them."""
    if any(site.kind == "embedding" and site.quantize for site in base.sites.values()):
        base.store.tensors.update(base.scheme.tables(base.device))
