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

from .schemes.four_bit import NESTED_QUANT_MAP, quant_state

PARTS = ("absmax", "nested_absmax", "offset")


@dataclass(frozen=True)
class QuantizedShape:
    """What the bytes of a quantized weight do not tell: ``[(experts,) out, in]``, its dense dtype, its settings."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    quantization: Any


class Node(nn.Module):
    """A branch of the tree; computes nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this is storage of a qlora_fx model; call the model itself")


class QuantizedNode(Node):
    """The module path of quantized weights. Its buffers are the parts of their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptions: dict[str, QuantizedShape] = {}

    def parts(self, leaf: str) -> dict[str, torch.Tensor]:
        """The storage of the weight ``leaf``, by part."""
        found = {name: getattr(self, f"{leaf}_{name}", None) for name in PARTS}
        parts = {k: v for k, v in found.items() if v is not None}
        parts["packed"] = getattr(self, leaf)
        nested_map = self.__dict__.get("nested_quant_map")
        if nested_map is not None:
            parts["nested_quant_map"] = nested_map
        return parts

    def state(self, leaf: str) -> bnb.QuantState:
        """bitsandbytes' description of a weight that is one matrix."""
        d = self.descriptions[leaf]
        return quant_state(self.parts(leaf), d.shape, d.dtype, d.quantization)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for leaf, description in self.descriptions.items():
            stacked = len(description.shape) == 3
            for name in PARTS:
                part = destination.pop(f"{prefix}{leaf}_{name}", None)
                if stacked and part is not None:  # bitsandbytes has no form for a stack of matrices
                    destination[f"{prefix}{leaf}.{name}"] = part
            if not stacked:
                for key, value in self.state(leaf).as_dict(packed=True).items():
                    destination[f"{prefix}{leaf}.{key}"] = value

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
        local = dict(state)
        used: set[str] = set()
        for leaf, description in self.descriptions.items():
            keys = [k for k in state if k.startswith(f"{prefix}{leaf}.")]
            if not keys:
                missing.append(f"{prefix}{leaf}.absmax")
                return
            if len(description.shape) == 3:
                values = {k.removeprefix(f"{prefix}{leaf}."): state[k] for k in keys}
            else:
                theirs = bnb.QuantState.from_dict(
                    {k.removeprefix(prefix): state[k] for k in keys}, device=self.device_of(leaf)
                )
                ours = self.state(leaf)
                mine, new = (
                    (s.quant_type, s.blocksize, tuple(s.shape), s.nested) for s in (ours, theirs)
                )
                if mine != new:
                    errors.append(f"{prefix}{leaf}: storage {new} does not fit {mine}")
                    return
                values = {"absmax": theirs.absmax}
                if theirs.nested:
                    values |= {"nested_absmax": theirs.state2.absmax, "offset": theirs.offset}
            used.update(keys)
            local |= {f"{prefix}{leaf}_{k}": v for k, v in values.items()}
        local = {k: v for k, v in local.items() if k not in used}
        super()._load_from_state_dict(local, prefix, metadata, strict, missing, [], errors)
        for key in used:
            if key in unexpected:
                unexpected.remove(key)

    def device_of(self, leaf: str) -> torch.device:
        tensor: torch.Tensor = getattr(self, leaf)
        return tensor.device


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
        node = self.node(path, QuantizedNode())
        assert isinstance(node, QuantizedNode)
        node.descriptions[leaf] = description
        packed = nn.Parameter(parts["packed"], requires_grad=False)
        node.register_parameter(leaf, packed)
        self.tensors[key] = packed
        for name in PARTS:
            if name in parts:
                self.tensors[f"{key}.{name}"] = parts[name]
                node.register_buffer(f"{leaf}_{name}", parts[name])
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
