"""A model's arguments: examples to capture with, and binding of a user's call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from .errors import InputError

EXAMPLE_BATCH, EXAMPLE_SEQUENCE = 2, 16
"""At least 2 each: export specializes sizes 0 and 1. Different, so that a size tells which it is."""


def example_inputs(model: Any, signature: inspect.Signature) -> dict[str, torch.Tensor]:
    """Arguments for the first capture, from the model's signature and config.

    Text models get ``input_ids`` and ``attention_mask`` ``[2, 16]`` int64, and ``labels`` where the forward
    takes them and the model's head scores every position (causal and masked language models).

    Raises:
        InputError: if the model's main input is not text; the user must pass ``example_inputs``.
    """
    names = signature.parameters
    device = next(model.parameters()).device
    if "input_ids" not in names or getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise InputError(
            f"cannot make example inputs for {type(model).__name__}, whose main input is "
            f"{getattr(model, 'main_input_name', '?')!r}; pass example_inputs={{name: tensor, ...}}, one batch "
            f"of your data. Its arguments: {', '.join(names)}"
        )
    ones = torch.ones(EXAMPLE_BATCH, EXAMPLE_SEQUENCE, dtype=torch.int64, device=device)
    inputs = {"input_ids": ones, "attention_mask": ones.clone()}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ones.clone()
    if "labels" in names and scores_every_position(model):
        inputs["labels"] = ones.clone()
    return {k: v for k, v in inputs.items() if k in names}


def scores_every_position(model: Any) -> bool:
    """True for language-model heads: labels have the shape of ``input_ids``."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head is not None


def bind(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The call's arguments by name, without those that equal their default.

    Raises:
        InputError: for an argument the model does not take.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(f"{error}; the model takes: {', '.join(signature.parameters)}") from None
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            values.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            raise InputError(
                f"positional arguments beyond {', '.join(signature.parameters)}: {value!r}"
            )
        else:
            default = signature.parameters[name].default
            if value is None or (not isinstance(value, torch.Tensor) and value is default):
                continue
            values[name] = value
    return {k: v for k, v in values.items() if v is not None}


def signature_key(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes two calls share a capture: argument names, ranks, dtypes and constant values."""
    return tuple((name, leaf_key(name, value)) for name, value in sorted(values.items()))


def leaf_key(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dim(), value.dtype)
    if isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(
        f"{name}={value!r} is a {type(value).__name__}; accepted: tensors, numbers, strings and flags"
    )


def vocabulary_size(model: Any) -> int | None:
    """Rows of the input embedding, or None where there is none."""
    try:
        rows = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return int(rows)


def check_call(
    values: Mapping[str, Any],
    device: torch.device,
    vocabulary: int | None,
    paired: bool = False,
) -> None:
    """Shapes, devices and, on a CPU, token ids that no graph would accept.

    Compiled code on a CPU ends the process at an index out of range, so that is looked for here. On a GPU
    the look would wait for the device; the kernel's own assertion reports it there.

    Raises:
        InputError: naming both shapes, both devices, or the ids.
    """
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.device != device:
            raise InputError(
                f"{name} is on {value.device}, the model on {device}; move it with .to({str(device)!r})"
            )
    if device.type == "cpu" and vocabulary is not None:
        for name in ("input_ids", "decoder_input_ids", "labels"):
            check_ids(name, values.get(name), vocabulary)
    labels, ids = values.get("labels"), values.get("input_ids")
    if (
        isinstance(labels, torch.Tensor)
        and labels.is_floating_point()
        and isinstance(ids, torch.Tensor)
        and labels.shape == ids.shape
    ):
        raise InputError(
            f"labels are {labels.dtype}; accepted: int64 token ids, -100 where there is no loss"
        )
    for name in ("labels", "attention_mask"):
        other = values.get(name)
        if not isinstance(other, torch.Tensor) or not isinstance(ids, torch.Tensor):
            continue
        if name == "labels" and paired:
            continue  # an encoder-decoder's target has a length of its own
        if other.dim() == 2 and other.shape != ids.shape:
            raise InputError(
                f"{name} has shape {list(other.shape)}, input_ids {list(ids.shape)}; accepted: the same shape"
            )


def check_ids(name: str, ids: Any, vocabulary: int) -> None:
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.numel() == 0:
        return
    checked = ids.masked_fill(ids == -100, 0) if name == "labels" else ids
    low, high = (int(v) for v in torch.aminmax(checked))
    if low < 0 or high >= vocabulary:
        extra = ", or -100 where there is no loss" if name == "labels" else ""
        raise InputError(
            f"{name} has values from {low} to {high}; accepted: 0 to {vocabulary - 1}{extra}"
        )
