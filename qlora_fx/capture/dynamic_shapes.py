"""Which sizes of a call's tensors are free: batch and sequence, named once and shared by all inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.export import Dim

from .arguments import ENCODED
from .cache import is_cross, is_past, past_tokens
from .pictures import MODALITIES, TABLE, grid_of, modality_of, sizes_of_pictures

TEXT = ("input_ids", "inputs_embeds")
DECODER = ("decoder_input_ids", "decoder_inputs_embeds", "decoder_attention_mask", "labels")
"""Arguments of an encoder-decoder that have the target's length."""
CACHED = ("past", "total")


def resized(
    inputs: Mapping[str, Any], encoder_decoder: bool = False, patches_per_token: int = 1
) -> dict[str, Any]:
    """Shapes to trace with: sizes 0 and 1 of free dimensions become 2, which export can keep dynamic.

    Or more, if another size is 2: export takes equal ones, such as tiles of a picture and tokens, for the same. With a cache, the tokens in it get a number that no other size has.

    Args:
        encoder_decoder: the model is an encoder-decoder, whose target has a length of its own.
        patches_per_token: of pictures.
    """
    free = free_dims(inputs, encoder_decoder, patches_per_token)
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    others = {
        size
        for k, v in tensors.items()
        if not is_past(k)  # whose other sizes are the model's
        for i, size in enumerate(v.shape)
        if i not in free.get(k, {})
    }
    few = next(n for n in itertools.count(2) if n not in others)
    found = {role: tensors[k].shape[i] for k, dims in free.items() for i, role in dims.items()}
    sizes = {role: size if size > 1 else few for role, size in found.items()}
    new = sizes.get("target", sizes.get("sequence"))
    for modality in MODALITIES:
        if f"{modality}_patches" in sizes:
            tokens = -(-sizes[f"{modality}_patches"] // patches_per_token)
            tokens = sizes[f"{modality}_tokens"] = max(tokens, 2)
            sizes[f"{modality}_patches"] = tokens * patches_per_token
    if "past" in sizes and new is not None:
        sizes["past"] = sum(size for role, size in sizes.items() if role not in CACHED) + 1
        sizes["total"] = sizes["past"] + new

    def shape_of(name: str, t: torch.Tensor) -> list[int]:
        roles = free.get(name, {})
        return [sizes[roles[i]] if i in roles else size for i, size in enumerate(t.shape)]

    return {
        k: v.new_empty(shape_of(k, v)) if isinstance(v, torch.Tensor) else v
        for k, v in inputs.items()
    }


def free_dims(
    inputs: Mapping[str, Any], encoder_decoder: bool, patches_per_token: int = 1
) -> dict[str, dict[int, str]]:
    """``batch``, ``sequence`` and ``target`` dimensions of each input that has them.

    The first dimension of the main input is the batch. Text inputs, and what has their length, share one
    sequence; in an encoder-decoder the decoder's inputs and the labels share another. With a cache there are also the
    ``past`` tokens in it, and all together, ``total``, which a mask tells of. Sizes of pictures are free, each by itself.
    """
    tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dim()}
    main = main_input(tensors)
    target = next((tensors[n] for n in DECODER if n in tensors), None) if encoder_decoder else None
    first = main if main is not None else next(iter(tensors.values()), None)
    if first is None:
        return {}
    batch = first.shape[0]
    past, new = past_tokens(tensors), main if target is None else target
    pictures = tensors.get("pixel_values")
    found: dict[str, dict[int, str]] = {}
    for name, tensor in tensors.items():
        if is_past(name):
            found[name] = {0: "batch", 2: "sequence"} if is_cross(name) else {0: "past", 1: "batch"}
            continue
        modality = modality_of(name, tensors)
        if modality is not None:
            found[name] = sizes_of_pictures(name, modality, tensors, patches_per_token)
            continue
        dims = found.setdefault(name, {})
        axes = name == "position_ids" and tensor.dim() == 3  # [axes, batch, sequence]
        decoder = target is not None and name in DECODER
        length = target if decoder else main
        for i, size in enumerate(tensor.shape):
            if i == 0 and main is not None and name in IMAGES:
                dims[i] = name  # a row may have none, or several
            elif i == 0 and name in PLACES and pictures is not None and size == len(pictures):
                dims[i] = "pixel_values"
            elif i == int(axes) and size == batch:
                dims[i] = "batch"
            elif is_embedded(name) and i == 2:
                continue
            elif i > 0 and length is not None and length.dim() > 1 and size == length.shape[1]:
                if name in IMAGES or name in PLACES:
                    continue
                dims[i] = "target" if decoder else "sequence"
            elif past and new is not None and size == past + new.shape[1]:
                dims[i] = "total"
    return found


def main_input(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The text, or the states of an encoder that has run: what has the sequence's length."""
    return next((inputs[name] for name in (*TEXT, ENCODED) if name in inputs), None)


def is_embedded(name: str) -> bool:
    """True for ``[batch, sequence, hidden]``, whose last size is the model's."""
    return name.endswith("inputs_embeds") or name == ENCODED


IMAGES = ("pixel_values", "pixel_values_videos", "input_features", "input_values")
"""Have sizes of their own, which may equal a text length by chance."""
PLACES = ("image_position_ids", "video_position_ids", TABLE)
"""Say of each picture where its patches are; a generation passes them with each token, without pictures."""


def example(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.ones(value.shape, dtype=value.dtype, device=value.device)


def shared_dims(
    inputs: Mapping[str, Any], encoder_decoder: bool = False, patches_per_token: int = 1
) -> dict[str, Any]:
    """One named ``Dim`` for batch, one for sequence, one for each further length; other sizes as export finds them."""
    free = free_dims(inputs, encoder_decoder, patches_per_token)
    if main_input(inputs) is None:
        return automatic_dims(inputs)
    named: dict[str, Any] = {name: Dim(name) for name in ("batch", "sequence", "target", "past")}
    named |= dict.fromkeys(("total", *IMAGES), Dim.AUTO)
    spec: dict[str, Any] = {}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            spec[name] = None
            continue
        if modality_of(name, inputs) is not None:
            continue
        dims: dict[int, Any] = {i: named[role] for i, role in free.get(name, {}).items()}
        for i, size in enumerate(value.shape):
            fixed = (is_embedded(name) and i == 2) or is_past(name)
            if i not in dims and size > 1 and not fixed:
                dims[i] = Dim.AUTO
        spec[name] = dims
    return spec | dims_of_pictures(inputs, patches_per_token)


def dims_of_pictures(inputs: Mapping[str, Any], patches_per_token: int) -> dict[str, Any]:
    """Of arguments whose sizes are those of pictures: how many there are, and patches as a multiple of their tokens."""
    named: dict[str, Any] = dict.fromkeys(map(grid_of, MODALITIES), Dim.AUTO)
    for modality in MODALITIES:
        tokens = named[f"{modality}_tokens"] = Dim(f"{modality}_tokens")
        named[f"{modality}_patches"] = patches_per_token * tokens
    spec: dict[str, Any] = {}
    for name, value in inputs.items():
        of = modality_of(name, inputs)
        if of is not None and isinstance(value, torch.Tensor):
            roles = sizes_of_pictures(name, of, inputs, patches_per_token)
            first = {i: named[role] for i, role in roles.items()}
            spec[name] = first or ({0: Dim.AUTO} if value.shape[0] > 1 else {})
    return spec


def has_pictures(inputs: Mapping[str, Any]) -> bool:
    """True for pictures ``[..., channels, height, width]``."""
    value = inputs.get("pixel_values")
    return isinstance(value, torch.Tensor) and value.dim() > 3


def has_free_pictures(inputs: Mapping[str, Any], dims: Mapping[str, Any]) -> bool:
    """True for pictures of any height or width."""
    return (
        has_pictures(inputs)
        and max(dims["pixel_values"], default=0) >= inputs["pixel_values"].dim() - 2
    )


def of_fixed_pictures(dims: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The same sizes, but pictures of one height and width: for models that take the root of a number of patches, or whose
    windows are long formulas of both (``LongFormulaError``)."""

    def fixed(inputs: Mapping[str, Any], *told: Any) -> dict[str, Any]:
        spec, rank = dims(inputs, *told), inputs["pixel_values"].dim()
        pictures = {i: dim for i, dim in spec["pixel_values"].items() if i < rank - 2}
        return spec | {"pixel_values": pictures}

    return fixed


def automatic_dims(
    inputs: Mapping[str, Any], encoder_decoder: bool = False, patches_per_token: int = 1
) -> dict[str, Any]:
    """Let export decide: sizes the model depends on become static. Those of pictures are as in ``shared_dims``."""
    free = {
        name: {i: Dim.AUTO for i, size in enumerate(value.shape) if size > 1}
        if isinstance(value, torch.Tensor)
        else None
        for name, value in inputs.items()
    }
    return free | dims_of_pictures(inputs, patches_per_token)


def is_about_dims(error: Exception) -> bool:
    text = str(error)
    return any(words in text for words in ABOUT_DIMS)


ABOUT_DIMS = (
    "Constraints violated",
    "dynamic_shapes",
    "specialized",
    "Cannot create Dim",  # torch 2.13 cannot say which constraint of S // 8 was violated
)
