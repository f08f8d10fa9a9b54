"""A model's arguments: examples to capture with, and binding of a user's call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError

EXAMPLE_BATCH, EXAMPLE_SEQUENCE, EXAMPLE_TARGET = 2, 16, 11
"""At least 2 each: export specializes sizes 0 and 1. Different, so that a size tells which it is."""

CLASSIFIERS = ("ForImageClassification", "ForSequenceClassification", "ForAudioClassification")


def example_inputs(
    model: Any, signature: inspect.Signature, device: torch.device | None = None
) -> dict[str, torch.Tensor]:
    """Arguments for the first capture, from the model's signature and config.

    - text: ``input_ids`` and ``attention_mask`` ``[2, 16]`` int64;
    - images: ``pixel_values`` ``[2, channels, height, width]`` of the config's ``image_size``;
    - sound: ``input_values`` ``[2, 16000]``, or ``input_features`` ``[2, mels, frames]`` as Whisper takes them.

    ``labels`` are added where the model scores every position (``[2, 16]``; in an encoder-decoder
    ``[2, 11]``, from which it makes its decoder's input) or every example (``[2]``).

    Raises:
        InputError: if the model's main input is none of these; the user must pass ``example_inputs``.
    """
    names = signature.parameters
    device = next(model.parameters()).device if device is None else device
    paired = is_paired(model)

    def ones(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    main = getattr(model, "main_input_name", "input_ids")
    shape = main_shape(main, model.config) if main in names else None
    if shape is None:
        raise InputError(
            f"cannot make example inputs for {type(model).__name__}, whose main input is {main!r}; pass "
            "example_inputs={name: tensor, ...}, one batch of your data. Its arguments: "
            + ", ".join(names)
        )
    inputs = {main: ones(*shape, dtype=torch.int64 if main == "input_ids" else torch.float32)}
    if main == "input_ids":
        inputs["attention_mask"] = ones(*shape)
    if "labels" in names and scores_every_position(model):
        inputs["labels"] = ones(EXAMPLE_BATCH, EXAMPLE_TARGET if paired else EXAMPLE_SEQUENCE)
    elif "labels" in names and type(model).__name__.endswith(CLASSIFIERS):
        inputs["labels"] = ones(EXAMPLE_BATCH)
    elif paired and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ones(EXAMPLE_BATCH, EXAMPLE_TARGET)
    return {k: v for k, v in inputs.items() if k in names}


def main_shape(name: str, config: Any) -> tuple[int, ...] | None:
    """The shape of an example of the main input; None where the config does not tell."""
    if name == "input_ids":
        return (EXAMPLE_BATCH, EXAMPLE_SEQUENCE)
    if name == "input_values" and hasattr(config, "conv_kernel"):
        return (EXAMPLE_BATCH, 16000)
    if name == "input_features" and hasattr(config, "max_source_positions"):
        mels = getattr(config, "num_mel_bins", None)
        return (EXAMPLE_BATCH, mels, 2 * config.max_source_positions) if mels else None
    if name == "pixel_values":
        size = getattr(config, "image_size", None)
        channels = getattr(config, "num_channels", None)
        if isinstance(size, int):
            size = (size, size)
        if size and channels:
            return (EXAMPLE_BATCH, channels, *size)
    return None


def scores_every_position(model: Any) -> bool:
    """True for language-model heads: labels have the shape of ``input_ids``."""
    try:
        return model.get_output_embeddings() is not None
    except (AttributeError, NotImplementedError):
        return False


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


def without_cache(signature: inspect.Signature, values: dict[str, Any]) -> dict[str, Any]:
    """The arguments with ``use_cache=False`` where the model takes it: a graph returns no cache."""
    return values | {"use_cache": False} if "use_cache" in signature.parameters else values


def is_paired(model: Any) -> bool:
    """True for encoder-decoders, whose target has a length of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


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
        if name == "labels" and any(n.endswith("embeds") for n in values):
            continue  # what is embedded besides the ids may have labels too
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
