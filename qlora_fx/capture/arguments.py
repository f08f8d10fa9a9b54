"""A call of the model: its arguments by name, and which calls share a captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..errors import InputError
from ..transformers_internals import BaseModelOutput
from .cache import taken_cache
from .cache_layers import Buffers
from .known_arguments import KnownArguments


class Signature(NamedTuple):
    """What makes two calls share a captured and compiled graph.

    Attributes:
        training: the mode.
        adapter: whether the adapter is in it.
        logits: whether the output has logits where it has a loss.
        arguments: names, ranks, dtypes and constant values.
    """

    training: bool
    adapter: bool
    logits: bool
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        without = "" if self.adapter else ", no adapter"
        without += "" if self.logits else ", no logits"
        return f"{mode}{without}({', '.join(name for name, _ in self.arguments)})"


@dataclass(frozen=True)
class Call:
    """One call of the model, as every part of the project sees it. Made by ``bind_call``.

    Attributes:
        values: the arguments by name, without those that equal their default.
        return_logits: what the caller said about logits; None where nothing was said.
        cache: the ``transformers.Cache`` that the call fills, whose tensors are among the values; None without.
    """

    values: dict[str, Any]
    return_logits: bool | None = None
    cache: Any = None

    def signature(self, *, training: bool, adapter: bool = True) -> Signature:
        """Which graph the call needs. In a training step logits only feed the loss, and are left out."""
        logits = self.return_logits
        if logits is None:
            logits = not (training and self.values.get("labels") is not None)
        return Signature(training, adapter, logits, argument_keys(self.values))


def bind_call(
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    known: KnownArguments,
    device: torch.device,
    buffers: Buffers | None = None,
) -> Call:
    """The call that ``forward(*args, **kwargs)`` stands for.

    ``use_cache`` is False unless it is asked for, or a cache is given; ``return_dict=True`` is the default and left
    out; ``num_items_in_batch`` is a tensor, since it differs from step to step.

    Args:
        buffers: lends a cache its buffers, where calls are recorded.

    Raises:
        InputError: an argument that the model does not take, one too many or too few, or a cache that graphs do not
            take.
    """
    for name, value in kwargs.items():
        if value is not None or not known.has_kwargs:
            known.check(name)
    keywords = dict(kwargs)
    logits = keywords.pop("return_logits", None)
    values = bind(signature, args, keywords)
    take_encoder_states(values)
    cache = taken_cache(values, known.model, is_encoder_decoder(known.model), buffers)
    if cache is None and "use_cache" in signature.parameters:
        values["use_cache"] = False
    if values.get("return_dict") is True:
        del values["return_dict"]
    without_flash_arguments(values, getattr(known.model, "config", None))
    count = values.get("num_items_in_batch")
    if isinstance(count, int):
        values["num_items_in_batch"] = torch.full((), count, device=device)  # waits for no copy
    return Call(values, None if logits is None else bool(logits), cache)


ENCODED = "encoder_outputs"
ENCODED_MASK = "encoder_outputs_mask"
"""Which of the encoder's states are of something, where it says so itself: a speech encoder has fewer than its input."""


def take_encoder_states(values: dict[str, Any]) -> None:
    """Let ``encoder_outputs`` be its hidden states, beside ``ENCODED_MASK``.

    Raises:
        InputError: it is neither a tuple nor transformers' ``BaseModelOutput``.
    """
    given = values.get(ENCODED)
    if given is None:
        return
    parts = tuple(given.values()) if isinstance(given, Mapping) else given
    if not isinstance(parts, (tuple, list)) or not parts or not isinstance(parts[0], torch.Tensor):
        raise InputError(
            f"{ENCODED} is a {type(given).__name__}; accepted: what model.get_encoder() returns, or a tuple that begins with "
            "hidden states [batch, sequence, hidden]"
        )
    values[ENCODED] = parts[0]
    mask = getattr(given, "attention_mask", None)
    if mask is not None:
        values[ENCODED_MASK] = mask


class EncoderOutput(BaseModelOutput):  # type: ignore[misc]
    """Hidden states and their mask: NLLB-MoE's decoder also hands on what the encoder's routers said."""

    attention_mask: torch.Tensor | None = None
    router_logits = None


def with_encoder_output(arguments: dict[str, Any]) -> dict[str, Any]:
    """What the model is called with while it is traced: the encoder's hidden states in an output of it."""
    if ENCODED not in arguments:
        return arguments
    output = EncoderOutput(last_hidden_state=arguments[ENCODED])
    output.attention_mask = arguments.get(ENCODED_MASK)
    return {k: v for k, v in arguments.items() if k != ENCODED_MASK} | {ENCODED: output}


def without_flash_arguments(values: dict[str, Any], config: Any) -> None:
    """Take out what only FlashAttention reads; what it says of packed rows, ``position_ids`` say as well.

    Raises:
        InputError: there are no ``position_ids``: the model would not see where a document ends.
    """
    given = [name for name in FLASH_ARGUMENTS if name in values]
    if not given or "flash" in str(getattr(config, "_attn_implementation", "")):
        return
    if "position_ids" not in values:
        raise InputError(
            f"{given[0]} is read by FlashAttention alone; accepted: position_ids that begin at 0 for each document of a row"
        )
    for name in given:
        del values[name]


FLASH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""How padding-free collators describe rows of several documents to FlashAttention."""


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


def argument_keys(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """Argument names, ranks, dtypes and constant values.

    Raises:
        InputError: for a value that is neither a tensor nor a constant.
    """
    return tuple((name, value_key(name, value)) for name, value in sorted(values.items()))


def value_key(name: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return (value.dim(), value.dtype)
    if isinstance(value, (bool, int, float, str)):
        return value
    raise InputError(
        f"{name}={value!r} is a {type(value).__name__}; accepted: tensors, numbers, strings and flags"
    )


def is_encoder_decoder(model: Any) -> bool:
    """True for encoder-decoders, whose target has a length of its own."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def vocabulary_size(model: Any) -> int | None:
    """Rows of the input embedding, or None where there is none."""
    try:
        rows = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return None
    return int(rows)
