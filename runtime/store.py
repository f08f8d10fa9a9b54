"""The parameter store: every tensor of the model once, under its Hugging Face name.

All captured graphs read the same tensors. ``Tree`` shows them as an ordinary ``nn.Module``, whose
``state_dict`` has transformers + bitsandbytes' keys for quantized weights (``weight``, ``weight.absmax``,
``weight.quant_map``, ``weight.nested_absmax``, ``weight.nested_quant_map``,
``weight.quant_state.bitsandbytes__nf4``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import nn

from .storage import NESTED_QUANT_MAP, quant_state

PARTS = ("absmax", "nested_absmax", "offset")


@dataclass(frozen=True)
class QuantizedShape:
    """What the bytes of a quantized weight do not tell: ``[out, in]``, its dense dtype, its settings."""

    shape: tuple[int, int]
    dtype: torch.dtype
    quantization: Any


class Node(nn.Module):
    """A branch of the tree; computes nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this is storage of a qlora_fx model; call the model itself")


class QuantizedNode(Node):
    """The module path of a quantized weight. Its buffers are the parts of the storage."""

    def __init__(self, description: QuantizedShape) -> None:
        super().__init__()
        self.description = description

    def parts(self, nested_quant_map: torch.Tensor | None) -> dict[str, torch.Tensor]:
        found = {name: getattr(self, f"weight_{name}", None) for name in PARTS}
        parts = {k: v for k, v in found.items() if v is not None}
        parts["packed"] = self.weight
        if nested_quant_map is not None:
            parts["nested_quant_map"] = nested_quant_map
        return parts

    def state(self) -> bnb.QuantState:
        d = self.description
        return quant_state(self.parts(self._nested_map()), d.shape, d.dtype, d.quantization)

    def _nested_map(self) -> torch.Tensor | None:
        return self.__dict__.get("nested_quant_map")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in PARTS:
            destination.pop(f"{prefix}weight_{name}", None)
        for key, value in self.state().as_dict(packed=True).items():
            destination[f"{prefix}weight.{key}"] = value

    def _load_from_state_dict(
        self,
        state: Any,
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        keys = [k for k in state if k.startswith(f"{prefix}weight.")]
        if not keys:
            missing.append(f"{prefix}weight.absmax")
            return
        theirs = bnb.QuantState.from_dict(
            {k.removeprefix(prefix): state[k] for k in keys}, device=self.weight.device
        )
        ours = self.state()
        mine, new = ((s.quant_type, s.blocksize, tuple(s.shape), s.nested) for s in (ours, theirs))
        if mine != new:
            errors.append(f"{prefix}weight: storage {new} does not fit {mine}")
            return
        values = {"absmax": theirs.absmax}
        if theirs.nested:
            values |= {"nested_absmax": theirs.state2.absmax, "offset": theirs.offset}
        local = {k: v for k, v in state.items() if k not in keys}
        local |= {f"{prefix}weight_{k}": v for k, v in values.items()}
        super()._load_from_state_dict(local, prefix, metadata, strict, missing, [], errors)
        for key in keys:
            if key in unexpected:
                unexpected.remove(key)


class Store:
    """Tensors by key, and their place in a module tree.

    Args:
        root: the module that shows the tensors as its own parameters and buffers.
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.tensors: dict[str, torch.Tensor] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def add(self, key: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
        """Hold ``tensor``: a ``Parameter`` keeps its ``requires_grad``, another tensor becomes a buffer."""
        self.tensors[key] = tensor
        path, _, leaf = key.rpartition(".")
        node = self.node(path)
        if isinstance(tensor, nn.Parameter):
            node.register_parameter(leaf, tensor)
        else:
            node.register_buffer(leaf, tensor, persistent=persistent)

    def add_quantized(
        self, key: str, parts: dict[str, torch.Tensor], description: QuantizedShape
    ) -> None:
        """Hold the storage of the weight ``key``; its parts are read as ``key`` and ``key.<part>``."""
        path, _, leaf = key.rpartition(".")
        if leaf != "weight":
            raise ValueError(f"{key}: a quantized tensor must be called 'weight'")
        node = self.node(path, QuantizedNode(description))
        packed = nn.Parameter(parts["packed"], requires_grad=False)
        node.register_parameter("weight", packed)
        self.tensors[key] = packed
        for name in PARTS:
            if name in parts:
                self.tensors[f"{key}.{name}"] = parts[name]
                node.register_buffer(f"weight_{name}", parts[name])
        if "nested_quant_map" in parts:
            shared = self.tensors.setdefault(NESTED_QUANT_MAP, parts["nested_quant_map"])
            node.__dict__["nested_quant_map"] = shared  # held once, not a buffer of each weight

    def node(self, path: str, new: Node | None = None) -> nn.Module:
        """The branch at ``path``, made if it is not there; ``new`` takes the place of a plain one."""
        module = self.root
        parts = path.split(".") if path else []
        for i, name in enumerate(parts):
            child = module._modules.get(name)
            last = i == len(parts) - 1
            if child is None or (last and new is not None and type(child) is Node):
                made = new if last and new is not None else Node()
                if child is not None:
                    made._parameters.update(child._parameters)
                    made._buffers.update(child._buffers)
                    made._modules.update(child._modules)
                module.add_module(name, made)
                child = made
            module = child
        return module

    def bytes_of(self, key: str) -> int:
        """Bytes held for ``key``, with all parts of a quantized weight but the shared map."""
        names = (key, *(f"{key}.{part}" for part in PARTS))
        return sum(self.tensors[n].nbytes for n in names if n in self.tensors)

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())
