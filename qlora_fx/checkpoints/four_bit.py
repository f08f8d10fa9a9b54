"""Weights that a checkpoint has in 4 bits: bitsandbytes' keys, or those of our own format (save.py)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes.functional as bnb
import torch
from transformers import BitsAndBytesConfig

from ..compiler.request import check_quantization
from ..config import Quantization
from ..errors import CheckpointError, ConfigError
from ..passes.graph.site import Layout
from ..runtime.ops import NESTED_BLOCKSIZE
from ..runtime.safetensors_reader import Entry, Shards
from ..runtime.schemes import part_key, scheme_of
from ..runtime.schemes.four_bit import NESTED_QUANT_MAP
from .locate import OWN_METHOD, Source

STATE = ".quant_state.bitsandbytes__"
"""Between a weight's key and its type in the key of its description (bitsandbytes, ``QuantState.as_dict``)."""
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True)
class StoredWeight:
    """A weight that arrives in 4 bits.

    Attributes:
        key: its name in the checkpoint.
        shape: ``[(experts,) out, in]`` in the order in which it is stored.
        dtype: of the dense weight.
        offset: of double quantization; None where it is a tensor of its own, or there is none.
        own: whether it is of our own format.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: float | None = None
    own: bool = False

    def names(self, quantization: Quantization) -> dict[str, str]:
        """The tensor of the checkpoint that each part is in; the shared map is in all of bitsandbytes' weights."""
        parts = scheme_of(quantization).parts(self.shape)
        return {
            name: part_key(self.key, name, part)
            for name, part in parts.items()
            if not part.shared and (self.own or name != "offset")
        }

    def check(self, entries: Mapping[str, Entry], quantization: Quantization) -> None:
        """Raise if a part is missing or not as the description says.

        Raises:
            CheckpointError: naming the part and its file.
        """
        expected = scheme_of(quantization).parts(self.shape, name=self.key)
        file = entries[self.key].file
        for part, name in self.names(quantization).items():
            found = entries.get(name)
            if found is None:
                raise CheckpointError(
                    f"{name} is missing; {self.key} in {file} is in 4 bits and needs it"
                )
            shape, dtype = expected[part].shape, expected[part].dtype
            if found.shape != shape or found.dtype != dtype:
                raise CheckpointError(
                    f"{name} in {found.file} is {found.dtype} {list(found.shape)}; {self.key} "
                    f"{list(self.shape)} in {quantization.quant_type}, blocks of {quantization.blocksize}, needs "
                    f"{dtype} {list(shape)}"
                )

    def read(self, shards: Shards, quantization: Quantization) -> dict[str, torch.Tensor]:
        """Its storage, with the keys of ``Scheme.parts``.

        Raises:
            CheckpointError: it cannot be read, or has values that are not finite.
        """
        parts = {part: shards.read(name) for part, name in self.names(quantization).items()}
        if NESTED_QUANT_MAP in scheme_of(quantization).parts(self.shape):
            if self.offset is not None:
                parts["offset"] = torch.tensor(self.offset)
            parts[NESTED_QUANT_MAP] = bnb.create_dynamic_map()
        for part in ("absmax", "nested_absmax", "offset"):
            values = parts.get(part)
            if values is not None and values.is_floating_point() and not values.isfinite().all():
                raise CheckpointError(
                    f"{self.key} in {shards.entries[self.key].file} has values in its {part} that are not finite"
                )
        return parts


@dataclass(frozen=True)
class StoredWeights:
    """All weights that arrive in 4 bits, and their common settings.

    Attributes:
        weights: by name in the checkpoint.
        quantization: their settings; None where there are none.
        compute_dtype: what the checkpoint asks for.
        also_quantize: roles that our own format has in 4 bits.
    """

    weights: Mapping[str, StoredWeight]
    quantization: Quantization | None = None
    compute_dtype: torch.dtype | None = None
    also_quantize: tuple[str, ...] = ()

    def belongs(self, name: str) -> bool:
        """True for what accompanies a weight in 4 bits."""
        owner, _, leaf = name.rpartition(".")
        if leaf in (*COMPANIONS, "offset"):
            return owner in self.weights
        return STATE in name and name.split(STATE)[0] in self.weights


def find_stored(source: Source, shards: Shards) -> StoredWeights:
    """What a checkpoint's config and tensors say about 4-bit weights.

    Raises:
        ConfigError: it is quantized in a way that is neither bitsandbytes' 4-bit nor ours.
        CheckpointError: a part is missing, misshapen, or weights disagree about their settings.
    """
    found = source.quantization
    described = [name for name in source.entries if STATE in name]
    if found is None:
        if described:
            raise CheckpointError(
                f"{described[0]} in {source.entries[described[0]].file} is bitsandbytes' description of a 4-bit "
                f"weight, and {source.folder / 'config.json'} has no quantization_config"
            )
        return StoredWeights({})
    if found.get("quant_method") == OWN_METHOD:
        return find_own(source, found)
    if not (found.get("load_in_4bit") or found.get("_load_in_4bit")):
        raise ConfigError(
            f"{source.name!r} has quantization_config with quant_method={found.get('quant_method')!r}, "
            f"load_in_4bit={found.get('load_in_4bit')!r}; accepted: bitsandbytes with load_in_4bit=True, "
            f"{OWN_METHOD!r}, or an unquantized checkpoint"
        )
    checked, compute = check_quantization(BitsAndBytesConfig.from_dict(found), 64)
    weights: dict[str, StoredWeight] = {}
    blocksizes: dict[int, str] = {}
    for name in described:
        weight, size = read_state(name, shards, checked)
        weights[weight.key] = weight
        blocksizes.setdefault(size, weight.key)
    if len(blocksizes) > 1:
        listed = ", ".join(f"{key} has {size}" for size, key in blocksizes.items())
        raise CheckpointError(f"blocksizes differ: {listed}; accepted: one for all weights")
    checked = replace(checked, blocksize=next(iter(blocksizes), 64), skip=())
    for weight in weights.values():
        weight.check(source.entries, checked)
    return StoredWeights(weights, checked, compute)


def read_state(name: str, shards: Shards, quantization: Quantization) -> tuple[StoredWeight, int]:
    """One of bitsandbytes' descriptions: the weight, and its blocksize."""
    key, _, kind = name.rpartition(STATE)
    entry = shards.entries[name]

    def wrong(fault: str) -> CheckpointError:
        return CheckpointError(f"{name} in {entry.file} {fault}")

    if key not in shards.entries:
        raise wrong(f"describes {key}, which is missing")
    if kind != quantization.quant_type:
        raise wrong(f"is of type {kind}; config.json says {quantization.quant_type}")
    try:
        state = json.loads(bytes(shards.read(name).tolist()))
        nested = "nested_absmax" in {
            n.rpartition(".")[2] for n in shards.entries if n.startswith(f"{key}.")
        }
        shape = tuple(int(n) for n in state["shape"])
        dtype = getattr(torch, state["dtype"])
        size = int(state["blocksize"])
        offset = float(state["nested_offset"]) if nested else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong(f"cannot be understood: {error!r}") from error
    if nested != quantization.double_quant:
        raise wrong(f"has nested={nested}; config.json says {quantization.double_quant}")
    if nested and int(state["nested_blocksize"]) != NESTED_BLOCKSIZE:
        raise wrong(
            f"has nested_blocksize {state['nested_blocksize']}; accepted: {NESTED_BLOCKSIZE}"
        )
    if len(shape) != 2 or math.prod(shape) == 0:
        raise wrong(f"has shape {list(shape)}; accepted: [out, in]")
    maps = {"quant_map": bnb.get_4bit_type(kind, device="cpu")}
    if nested:
        maps["nested_quant_map"] = bnb.create_dynamic_map()
    for leaf, values in maps.items():
        if f"{key}.{leaf}" not in shards.entries:
            raise CheckpointError(
                f"{key}.{leaf} is missing; {key} in {entry.file} is in 4 bits and needs it"
            )
        if not torch.equal(shards.read(f"{key}.{leaf}"), values):
            raise CheckpointError(
                f"{key}.{leaf} in {shards.entries[f'{key}.{leaf}'].file} is not bitsandbytes' own map of {kind}"
            )
    return StoredWeight(key, shape, dtype, offset), size


def find_own(source: Source, found: Mapping[str, Any]) -> StoredWeights:
    """The same of our own format."""
    try:
        settings = Quantization(
            found["quant_type"],
            int(found["blocksize"]),
            bool(found["double_quant"]),
            getattr(torch, found["quant_storage"]),
        )
        weights = {
            key: StoredWeight(
                key, tuple(fields["shape"]), getattr(torch, fields["dtype"]), own=True
            )
            for key, fields in found["weights"].items()
        }
        roles = tuple(found["also_quantize"])
        compute = getattr(torch, found["compute_dtype"])
        scheme_of(settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"quantization_config in {source.folder / 'config.json'} is not what save_quantized writes: {error!r}"
        ) from error
    if found.get("version") != 1:
        raise CheckpointError(
            f"{source.name!r} has version {found.get('version')!r} of the format; accepted: 1"
        )
    for key, weight in weights.items():
        if key not in source.entries:
            raise CheckpointError(f"{key} is missing; {source.folder / 'config.json'} lists it")
        weight.check(source.entries, settings)
    return StoredWeights(weights, settings, compute, roles)


def merge_settings(
    stored: StoredWeights,
    bnb_config: BitsAndBytesConfig | None,
    requested: Quantization,
    source: str,
) -> Quantization:
    """Settings for a model whose weights arrive in 4 bits: the checkpoint's, which the user's must equal.

    Args:
        bnb_config: the user's; None where there is none.
        requested: the same with its defaults, and the blocksize.
        source: the checkpoint, for messages.

    Raises:
        ConfigError: naming the field that differs.
    """
    assert stored.quantization is not None
    if bnb_config is not None:
        for name in ("quant_type", "double_quant", "storage_dtype"):
            mine, theirs = getattr(requested, name), getattr(stored.quantization, name)
            if mine != theirs:
                raise ConfigError(
                    f"quantization has {name}={mine}, and {source!r} is stored with {theirs}; accepted: "
                    "quantization=None, or the same"
                )
    if requested.blocksize not in (64, stored.quantization.blocksize):
        raise ConfigError(
            f"blocksize={requested.blocksize}, and {source!r} is stored with {stored.quantization.blocksize}"
        )
    return replace(stored.quantization, skip=requested.skip)


def bitsandbytes_layout(shape: tuple[int, ...], transposed: bool) -> Layout:
    """How bitsandbytes takes a parameter: as it is, or transposed where the module is a ``Conv1D``."""
    if transposed:
        return Layout(shape, (1, 0), (shape[1], shape[0]))
    return Layout(shape, (0, 1), shape)
