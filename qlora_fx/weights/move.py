"""Fill the store of a prepared model from a real model, or from single tensors as they arrive."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
from torch import nn

from ..config import Config
from ..model import QLoRAModel
from ..passes.graph.site import Site
from ..runtime.parameter_store import QuantizedShape
from ..runtime.schemes.four_bit import QUANT_MAP, quantize_weight


def quantized_sites(qmodel: QLoRAModel) -> dict[str, Site]:
    """One site per weight that is stored in 4 bits, by store key."""
    return {site.weight: site for site in qmodel._sites.values() if site.quantize}


def move_weights(model: nn.Module, qmodel: QLoRAModel, config: Config) -> None:
    """Move every tensor of ``model`` to the store; quantize selected weights one at a time.

    Nothing here keeps a reference to a dense weight once its storage exists.
    """
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, key in qmodel._blueprint.keys.items():
        path, _, leaf = name.rpartition(".")
        places.setdefault(key, []).append((model.get_submodule(path), leaf))
    by_weight = quantized_sites(qmodel)
    for key, where in places.items():
        module, leaf = where[0]
        site = by_weight.get(key)
        tensor = getattr(module, leaf)
        qmodel._dense_bytes[key] = tensor.nbytes
        if site is not None:
            assert site.layout is not None
            dense = site.layout.of(tensor.detach())
            parts = quantize_weight(dense, config.quantization)
            qmodel._store.add_quantized(
                key, parts, QuantizedShape(site.shape, tensor.dtype, config.quantization)
            )
            for owner, name in where:
                owner._parameters[name] = nn.Parameter(
                    torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"),
                    requires_grad=False,
                )
            del tensor, dense, parts
        else:
            add_dense(qmodel, key, tensor, module, leaf)
    add_quant_map(qmodel, config)


def add_dense(
    qmodel: QLoRAModel, key: str, tensor: torch.Tensor, module: nn.Module, leaf: str
) -> None:
    """Hold a tensor as what ``module.leaf`` is: a parameter or a buffer."""
    if isinstance(getattr(module, leaf), nn.Parameter):
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        qmodel._store.add(key, tensor.requires_grad_(False))
    else:
        persistent = leaf not in module._non_persistent_buffers_set
        qmodel._store.add(key, tensor, persistent=persistent)


def add_quant_map(qmodel: QLoRAModel, config: Config) -> None:
    """Hold the 16 values of the 4-bit type where single rows are looked up with them."""
    if any(site.kind == "embedding" and site.quantize for site in qmodel._sites.values()):
        kind = config.quantization.quant_type
        values = bnb.get_4bit_type(kind, device=str(qmodel.device))
        qmodel._store.tensors[f"{QUANT_MAP}.{kind}"] = values
