"""The parameter store: every tensor of the model once, under its Hugging Face name.

All captured graphs read the same tensors. ``Tree`` shows them as an ordinary ``nn.Module``, whose
``state_dict`` has transformers + bitsandbytes' keys for weights in 4 bits (``weight``, ``weight.absmax``,
``weight.quant_map``, ``weight.nested_absmax``, ``weight.nested_quant_map``,
``weight.quant_state.bitsandbytes__nf4``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from .schemes import PACKED, Part, Scheme, part_key


@dataclass(frozen=True)
class QuantizedShape:
    """What the bytes of a quantized weight do not tell: ``[(experts,) out, in]``, its dense dtype, its scheme."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    scheme: Scheme

    @property
    def parts(self) -> dict[str, Part]:
        return self.scheme.parts(self.shape)

    @property
    def buffers(self) -> list[str]:
        """Names of the parts that are buffers beside the packed weight."""
        return [name for name, part in self.parts.items() if name != PACKED and not part.shared]


class Node(nn.Module):
    """A branch of the tree; computes nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("this is storage of a qlora_fx model; call the model itself")


class QuantizedState(nn.Module):
    """The state of a module with quantized weights, in transformers + bitsandbytes' keys.

    Attributes:
        descriptions: by the weight's own name.
        held: all parts of each weight, the shared ones too, which are no buffers here.
    """

    descriptions: dict[str, QuantizedShape]
    held: dict[str, dict[str, torch.Tensor]]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for leaf, d in self.descriptions.items():
            for name in d.buffers:
                del destination[f"{prefix}{leaf}_{name}"]
            state = d.scheme.to_state(self.held[leaf], d.shape, d.dtype)
            destination.update({f"{prefix}{leaf}.{k}": v for k, v in state.items()})

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
        for leaf, d in self.descriptions.items():
            keys = [k for k in state if k.startswith(f"{prefix}{leaf}.")]
            if not keys and d.buffers:
                missing.append(f"{prefix}{leaf}.{d.buffers[0]}")
                return
            found = {k.removeprefix(f"{prefix}{leaf}."): state[k] for k in keys}
            try:
                values = d.scheme.from_state(found, self.held[leaf], d.shape, d.dtype)
            except CheckpointError as error:
                errors.append(f"{prefix}{leaf}: {error}")
                return
            used.update(keys)
            local |= {f"{prefix}{leaf}_{k}": v for k, v in values.items()}
        local = {k: v for k, v in local.items() if k not in used}
        super()._load_from_state_dict(local, prefix, metadata, strict, missing, unexpected, errors)


class QuantizedNode(QuantizedState, Node):
    """The module path of quantized weights. Its buffers are the parts of their storage."""

    def __init__(self) -> None:
        super().__init__()
        self.descriptions = {}
        self.held = {}


class Store:
    """Tensors by key, and their place in a module tree.

    Args:
        root: the module that shows the tensors as its own parameters and buffers.

    Attributes:
        tensors: all of them.
        quantized: which keys are of quantized weights; their other parts have keys of their own (``part_key``).
    """

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.tensors: dict[str, torch.Tensor] = {}
        self.quantized: dict[str, QuantizedShape] = {}

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
        """Hold the storage of the weight ``key``. A part that all weights share is held once."""
        path, _, leaf = key.rpartition(".")
        node = self.node(path, QuantizedNode())
        assert isinstance(node, QuantizedNode)
        node.descriptions[leaf] = self.quantized[key] = description
        for name, part in description.parts.items():
            place, tensor = part_key(key, name, part), parts[name]
            if name == PACKED:
                tensor = nn.Parameter(tensor, requires_grad=False)
                node.register_parameter(leaf, tensor)
            elif part.shared:
                tensor = self.tensors.get(place, tensor)
            else:
                node.register_buffer(f"{leaf}_{name}", tensor)
            self.tensors[place] = tensor
        node.held[leaf] = self.parts(key)

    def parts(self, key: str) -> dict[str, torch.Tensor]:
        """The storage of a quantized weight, by part."""
        places = self.quantized[key].parts.items()
        return {name: self.tensors[part_key(key, name, part)] for name, part in places}

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
        """Bytes held for ``key``, with all parts of a quantized weight but the shared ones."""
        return sum(self.tensors[k].nbytes for k in self.keys_of(key) if k in self.tensors)

    def keys_of(self, key: str) -> list[str]:
        """Under which keys a weight is held; without the parts that it shares."""
        if key not in self.quantized:
            return [key]
        parts = self.quantized[key].parts.items()
        return [part_key(key, name, part) for name, part in parts if not part.shared]

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())
