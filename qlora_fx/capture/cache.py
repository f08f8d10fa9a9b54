"""A call's key/value cache: transformers' ``Cache`` as tensors of the graph, and back."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache

from ..errors import CaptureError, InputError
from ..runtime.cached_attention import FEW
from ..transformers_internals import DynamicLayer, DynamicSlidingWindowLayer
from .cache_layers import INNER, Buffers, GrowingLayer, TracedLayer, grow

ARGUMENT = "past_key_values"
PARTS = ("keys", "values")
CROSS = "cross_"
PAST = re.compile(rf"{ARGUMENT}_(\d+)_({CROSS})?({'|'.join(PARTS)})")
"""Names of a graph's inputs that are a cache's tensors; with ``cross_`` those of an encoder's states."""
START = f"{ARGUMENT}_start"
"""The input that says how many tokens a ring holds, which its buffers do not: runtime/ring.py."""
OF_A_RING = ("input_ids", "attention_mask", "position_ids")
"""Tensors of a call that may be made with a ring: a mask and positions tell all that the number of earlier tokens told."""


def is_past(name: str) -> bool:
    """True for an input that is a cache's tensor."""
    return PAST.fullmatch(name) is not None


def is_cross(name: str) -> bool:
    """True for keys or values of an encoder's states, ``[batch, heads, source, size]``."""
    found = PAST.fullmatch(name)
    return found is not None and found[2] is not None


def past_tokens(values: Mapping[str, Any]) -> int:
    """How many earlier tokens a call's graph sees; 0 without a cache."""
    own = (t for name, t in values.items() if is_past(name) and not is_cross(name))
    return next((int(t.shape[0]) for t in own), 0)


def caches(model: Any) -> bool:
    """Whether a model's own cache is one that graphs take: keys and values of every token, layer by layer."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    able = getattr(model, "_supports_default_dynamic_cache", None)
    named = ARGUMENT in inspect.signature(type(model).forward).parameters
    if not named or able is None or not able() or type(model).__name__ in OF_PICTURES:
        return False
    return all(fits(layer) for layer in DynamicCache(config=config.get_text_config()).layers)


OF_PICTURES = frozenset({"MllamaForConditionalGeneration"})
"""Models in whose cache some layers have the keys and values of pictures instead."""


def fits(layer: Any) -> bool:
    """A window's layer that is still empty is one of all tokens: the mask hides what is outside of the window."""
    empty_window = type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized
    return type(layer) in (DynamicLayer, GrowingLayer) or empty_window


def taken_cache(
    values: dict[str, Any], model: Any, encoder_decoder: bool, source: Buffers | None = None
) -> Cache | None:
    """Take ``past_key_values`` out of a call's arguments, and put the tensors of it in.

    Args:
        values: of a call with ``use_cache=True`` or with a cache.
        encoder_decoder: its cache holds the keys and values of the encoder's states besides.
        source: lends the cache its buffers, for calls that are recorded.

    Returns:
        The cache that the call will fill: the caller's, or a new one. None without.

    Raises:
        InputError: a kind of cache that graphs do not take.
    """
    cache = values.pop(ARGUMENT, None)
    if not values.get("use_cache", cache is not None):
        if cache is not None:
            raise InputError(
                "past_key_values with use_cache=False; accepted: use_cache=True, or no cache"
            )
        return None
    if values.get("return_dict") is False:
        raise InputError("return_dict=False with use_cache=True; accepted: return_dict=True")
    if cache is None:
        if not caches(model):
            raise InputError(
                f"use_cache=True is not supported for {type(model).__name__}; accepted: False (recompute the prefix)"
            )
        cache = empty_cache(DynamicLayer, encoder_decoder)
    check_cache(cache, encoder_decoder)
    values["use_cache"] = True
    own, cross = halves(cache)
    growing = [as_growing(layer, i, source) for i, layer in enumerate(own.layers)]
    own.layers[:] = growing
    for layer in growing:
        layer.settle()
    if source is not None and cross is None and takes_a_ring(values, model, growing, source):
        earlier = [layer.buffers for layer in growing]
        as_ring(values, growing[0])
    else:
        earlier = [layer.past() for layer in growing]
    for number, tensors in enumerate(earlier):
        for part, tensor in zip(PARTS, tensors, strict=False):
            values[f"{ARGUMENT}_{number}_{part}"] = tensor
    for number, layer in enumerate(cross.layers if cross is not None else ()):
        if cache.is_updated.get(number):
            layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()
            for part in PARTS:
                values[f"{ARGUMENT}_{number}_{CROSS}{part}"] = getattr(layer, part)
    return cache


def empty_cache(layer: type, encoder_decoder: bool) -> Any:
    """A cache whose layers, when they come, are of a class."""
    made = [DynamicCache() for _ in range(1 + encoder_decoder)]
    for one in made:
        one.layer_class_to_replicate = layer
    return EncoderDecoderCache(*made) if encoder_decoder else made[0]


def halves(cache: Any) -> tuple[DynamicCache, DynamicCache | None]:
    """A cache of the decoder's own tokens, and an encoder-decoder's of the encoder's states."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache, cache.cross_attention_cache
    return cache, None


def check_cache(cache: Any, encoder_decoder: bool) -> None:
    """Raise ``InputError`` for a kind of cache that graphs do not take."""
    several = [one for one in halves(cache) if one is not None]
    layers = [layer for one in several for layer in getattr(one, "layers", ())]
    plain = all(type(one) is DynamicCache and not one.offloading for one in several)
    right = isinstance(cache, EncoderDecoderCache) is encoder_decoder
    if not right or not plain or not all(fits(layer) for layer in layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        accepted = (
            "an EncoderDecoderCache of two DynamicCache" if encoder_decoder else "a DynamicCache"
        )
        raise InputError(
            f"past_key_values is a {type(cache).__name__} of {', '.join(kinds) or 'nothing'}; accepted: {accepted} "
            "of DynamicLayer"
        )


def takes_a_ring(
    values: Mapping[str, Any], model: Any, layers: list[GrowingLayer], source: Buffers
) -> bool:
    """Whether a call may see its cache as a ring: it says where its tokens stand, and may be told by a mask which there are."""
    tensors = {name: t for name, t in values.items() if isinstance(t, torch.Tensor)}
    if torch.is_grad_enabled() or set(tensors) | {"attention_mask"} != set(OF_A_RING):
        return False
    if not layers or not all(map(source.has_lent, layers)):
        return False
    if len({(len(layer.buffers[0]), layer.get_seq_length()) for layer in layers}) > 1:
        return False
    rows, tokens = tensors["input_ids"].shape
    mask = tensors.get("attention_mask")
    if mask is None:
        model_class: Any = type(model)
        can_be_told = takes_a_mask(model_class)
    else:
        expected = (rows, layers[0].get_seq_length() + tokens)
        can_be_told = mask.shape == expected and not mask.is_floating_point()
    return can_be_told and tokens <= FEW


@functools.cache
def takes_a_mask(model_class: Any) -> bool:
    return "attention_mask" in inspect.signature(model_class.forward).parameters


def as_ring(values: dict[str, Any], layer: GrowingLayer) -> None:
    """Tell the graph of the room behind the tokens of a cache. Note [A ring]."""
    ids, room, written = values["input_ids"], len(layer.buffers[0]), layer.get_seq_length()
    mask = values.get("attention_mask")
    if mask is None:
        mask = ids.new_ones(ids.shape[0], written + ids.shape[1])
    values["attention_mask"] = torch.nn.functional.pad(mask, (room - written, 0))
    values[START] = torch.full((), written, device=ids.device)  # waits for no copy


def as_growing(layer: Any, number: int, source: Buffers | None) -> GrowingLayer:
    """A layer of a cache, or one that shows the same and takes its place."""
    if type(layer) is GrowingLayer:
        if source is not None:
            layer.source = source
        return layer
    growing = GrowingLayer(number, source)
    growing.keys, growing.values = layer.keys, layer.values
    growing.is_initialized = layer.is_initialized
    return growing


def filled(cache: Any, output: Any, source: Buffers | None = None) -> Any:
    """The output of a graph with ``cache`` in it, which holds the call's tokens now.

    Args:
        source: as in ``taken_cache``.
    """
    own, cross = halves(cache)
    new, encoded = output[ARGUMENT]
    own.layers += [GrowingLayer(i, source) for i in range(len(own.layers), len(new))]
    pairs = [(layer, rows) for layer, rows in zip(own.layers, new, strict=False) if rows]
    grow([layer for layer, _ in pairs], [rows for _, rows in pairs])
    for number, states in enumerate(encoded):
        if states and cross is not None:
            with torch.inference_mode(False):  # they outlive the mode
                layer = DynamicLayer()
                layer.update(*(t.detach().clone() for t in states))
            cross.layers[number : number + 1] = [layer]
            cache.is_updated[number] = True
    output[ARGUMENT] = cache
    return output


def with_traced_cache(arguments: Mapping[str, Any], encoder_decoder: bool) -> dict[str, Any]:
    """What the model is called with while it is traced: its cache's tensors in a cache."""
    arguments = dict(arguments)
    if not arguments.get("use_cache"):
        return arguments
    past = [(m, arguments.pop(name)) for name in list(arguments) if (m := PAST.fullmatch(name))]
    start = arguments.pop(START, None)
    cache = empty_cache(TracedLayer, encoder_decoder)
    own, cross = halves(cache)
    for found, tensor in past:  # keys come before values
        number, of, part = int(found[1]), own if found[2] is None else cross, found[3]
        assert of is not None
        while len(of.layers) <= number:
            of.layers.append(TracedLayer())
        layer = of.layers[number]
        if of is own:
            layer.past, layer.start = (*layer.past, tensor), start
        else:
            setattr(layer, part, tensor)
            layer.is_initialized = cache.is_updated[number] = True
    return arguments | {ARGUMENT: cache}


def with_tensors(arguments: Mapping[str, Any], output: Any) -> Any:
    """The traced model's output with its cache's tensors in the place of the cache.

    Raises:
        CaptureError: the model has filled no cache.
    """
    cache = arguments.get(ARGUMENT)
    if not arguments.get("use_cache") or cache is None:
        return output
    own, cross = halves(cache)
    rows = tuple(layer.rows for layer in own.layers)
    if not any(rows) or not isinstance(output, MutableMapping):
        raise CaptureError("the model fills no cache; accepted: use_cache=False")
    encoded = tuple(
        tuple(t.permute(INNER) for t in layer.rows)
        for layer in (cross.layers if cross is not None else ())
    )
    output[ARGUMENT] = (rows, encoded)
    return output
