"""Which sizes of a call's tensors are free: batch and sequence, named once and shared by all inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.export import Dim


def resized(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes to trace with: sizes 0 and 1 of batch and sequence become 2, which export can keep dynamic."""
    main = main_shape(inputs)
    if main is None:
        return dict(inputs)
    batch, sequence = main

    def shape_of(t: torch.Tensor) -> list[int]:
        shape = list(t.shape)
        for i, size in enumerate(shape):
            if i == 0 and size == batch:
                shape[i] = max(batch, 2)
            elif i > 0 and size == sequence:
                shape[i] = max(sequence, 2)
        return shape

    return {
        k: v.new_empty(shape_of(v)) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }


def main_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """``(batch, sequence)`` of the model's main text input, or None where there is none."""
    for name in ("input_ids", "inputs_embeds"):
        tensor = inputs.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.dim() >= 2:
            return tensor.shape[0], tensor.shape[1]
    return None


def example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.ones(value.shape, dtype=value.dtype, device=value.device)


def shared_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """One named ``Dim`` for batch and one for sequence, shared by all inputs that have them."""
    main = main_shape(inputs)
    if main is None:
        return automatic_dims(inputs)
    batch, sequence = Dim("batch"), Dim("sequence")
    spec: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            spec[name] = None
            continue
        dims: dict[int, Any] = {}
        for i, size in enumerate(value.shape):
            if i == 0 and size == main[0]:
                dims[i] = batch
            elif i > 0 and size == main[1] and not (name == "inputs_embeds" and i == 2):
                dims[i] = sequence
            elif size > 1 and not (name == "inputs_embeds" and i == 2):
                dims[i] = Dim.AUTO
        spec[name] = dims
    return spec


def automatic_dims(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Let export decide: sizes the model depends on become static."""
    return {
        name: {i: Dim.AUTO for i, size in enumerate(value.shape) if size > 1}
        if isinstance(value, torch.Tensor)
        else None
        for name, value in inputs.items()
    }


def is_about_dims(error: Exception) -> bool:
    text = str(error)
    return "Constraints violated" in text or "dynamic_shapes" in text or "specialized" in text
