"""Whether a call's tensors fit the model, seen before any graph runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError
from .cache import past_tokens

TOKENS = ("input_ids", "decoder_input_ids")
"""Arguments that are token ids."""


def check_call(
    values: Mapping[str, Any],
    device: torch.device,
    vocabulary: int | None,
    encoder_decoder: bool = False,
) -> None:
    """Shapes, devices and, on a CPU, token ids that no graph would accept.

    Compiled code on a CPU ends the process at an index out of range, so that is looked for here. On a GPU
    the look would wait for the device; the kernel's own assertion reports it there.

    Raises:
        InputError: naming the shape, dtype, device or ids, and what is accepted.
    """
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.device != device:
            raise InputError(
                f"{name} is on {value.device}, the model on {device}; move it with .to({str(device)!r})"
            )
        if 0 in value.shape:
            raise InputError(
                f"{name} is empty, with shape {list(value.shape)}; accepted: at least 1 in every dimension"
            )
    for name in TOKENS:
        check_tokens(name, values.get(name))
    if device.type == "cpu" and vocabulary is not None:
        for name in (*TOKENS, "labels"):
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
    past = 0 if encoder_decoder else past_tokens(values)  # these are the encoder's
    for name in ("labels", "attention_mask"):
        other = values.get(name)
        if not isinstance(other, torch.Tensor) or not isinstance(ids, torch.Tensor):
            continue
        if name == "labels" and encoder_decoder:
            continue  # an encoder-decoder's target has a length of its own
        if name == "labels" and any(n.endswith("embeds") for n in values):
            continue  # what is embedded besides the ids may have labels too
        rows, tokens = ids.shape
        expected = (rows, tokens + past if name == "attention_mask" else tokens)
        if other.dim() == 2 and other.shape != expected:
            accepted = (
                f"{list(expected)}, with the {past} tokens of the cache"
                if past
                else "the same shape"
            )
            raise InputError(
                f"{name} has shape {list(other.shape)}, input_ids {list(ids.shape)}; accepted: {accepted}"
            )


def check_tokens(name: str, ids: Any) -> None:
    if not isinstance(ids, torch.Tensor):
        return
    if ids.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"{name} is {ids.dtype} of shape {list(ids.shape)}; accepted: token ids, int64 [batch, sequence]"
        )
    if ids.dim() < 2:
        raise InputError(
            f"{name} has shape {list(ids.shape)}; accepted: [batch, sequence], for a single row {name}[None]"
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
