"""Arguments to capture a model with, where the user gives none."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import PretrainedConfig

from ..errors import InputError
from .arguments import is_encoder_decoder
from .cache import caches

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
    encoder_decoder = is_encoder_decoder(model)

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
        inputs["labels"] = ones(
            EXAMPLE_BATCH, EXAMPLE_TARGET if encoder_decoder else EXAMPLE_SEQUENCE
        )
    elif "labels" in names and type(model).__name__.endswith(CLASSIFIERS):
        inputs["labels"] = ones(EXAMPLE_BATCH)
    elif encoder_decoder and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ones(EXAMPLE_BATCH, EXAMPLE_TARGET)
    return {k: v for k, v in inputs.items() if k in names}


def example_prompt(
    model: Any, signature: inspect.Signature, device: torch.device | None = None
) -> dict[str, Any]:
    """Arguments of the call that transformers' ``generate`` makes for a prompt without padding.

    Where the model has no cache that graphs take: what ``example_inputs`` gives, without labels. A model whose prompt is
    another call is captured once more.
    """
    inputs: dict[str, Any] = example_inputs(model, signature, device)
    names = signature.parameters
    labels = inputs.pop("labels", None)
    if labels is not None and is_encoder_decoder(model) and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = labels
    if set(inputs) - {"attention_mask"} != {"input_ids"} or not caches(model):
        return inputs
    shape = inputs["input_ids"].shape
    places = torch.arange(shape[1], device=inputs["input_ids"].device).expand(shape)
    prompt = {"position_ids": places, "logits_to_keep": 1, "use_cache": True}
    return {
        "input_ids": inputs["input_ids"],
        **{k: v for k, v in prompt.items() if k in names},
    }


def main_shape(name: str, config: PretrainedConfig) -> tuple[int, ...] | None:
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
