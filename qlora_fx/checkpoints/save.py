"""``save_quantized``: the base in 4 bits, as transformers + bitsandbytes would save it.

Where bitsandbytes' format can say what the model holds, the folder is an ordinary 4-bit checkpoint: the names
that ``save_pretrained`` writes, with ``weight.absmax``, ``weight.quant_map`` and so on beside each weight in 4 bits.

What it cannot say is 4-bit weights of anything but ``nn.Linear`` and ``Conv1D`` (stacks of experts, embeddings,
convolutions, bare parameters), and layouts other than theirs. Such a model is saved in a format of our own:

- files ``quantized.safetensors``, or ``quantized-0000n-of-0000m.safetensors`` with ``quantized.safetensors.index.json``;
  transformers looks for ``model.safetensors``, finds none, and says so instead of loading something else;
- tensors under the model's own parameter names; of a weight in 4 bits ``<name>`` (packed, with a leading
  dimension of experts where it is a stack), ``<name>.absmax``, and with double quantization ``<name>.nested_absmax``
  and ``<name>.offset`` (float32, one per matrix). The maps are bitsandbytes' constants and are not repeated;
- ``config.json`` with ``quantization_config``: ``quant_method`` "qlora_fx", ``version`` 1, ``quant_type``, ``blocksize``,
  ``double_quant``, ``quant_storage``, ``compute_dtype``, ``also_quantize``, and ``weights``: for each weight in 4 bits
  its ``shape`` as it multiplies, ``[(experts,) out, in]``, and its dense ``dtype``.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, Conv1D

from ..errors import ConfigError
from ..runtime.checkpoint_writer import FolderWriter, Spec
from ..runtime.schemes import PACKED, part_key
from ..runtime.schemes.four_bit import FourBit
from ..transformers_internals import names_not_saved, would_quantize
from ..weights.base import Base
from .conversion import plan_back
from .four_bit import bitsandbytes_layout
from .locate import BESIDE, OWN_METHOD, OWN_SINGLE, SINGLE

Replace = Callable[[str], dict[str, torch.Tensor] | None]
"""New storage of the weight of a parameter name, or None where it stays as it is."""


def unchanged(name: str) -> None:
    """A ``Replace`` that changes nothing."""


def write_quantized(
    base: Base,
    folder: str | os.PathLike[str],
    limit: int,
    replace: Replace | None = None,
) -> None:
    """Write the base in 4 bits in the format that can say it; what ``replace`` makes is held one at a time.

    Raises:
        ConfigError: nothing of it is in 4 bits.
    """
    if base.config.quantization.is_dense:
        raise ConfigError(
            "nothing is in 4 bits (quantization=False): the original checkpoint is the base; "
            "accepted: save_pretrained for the adapter, merge for both"
        )
    names = saved_names(base)
    settings, obstacles = bitsandbytes_config(base, names)
    write = as_ours if settings is None else as_bitsandbytes
    if settings is None:
        warnings.warn(
            f"{os.fspath(folder)!r} is saved in qlora_fx's own format, which qlora_fx.from_pretrained loads and "
            f"transformers does not, because in bitsandbytes' format {obstacles[0]}"
            + (f" (and {len(obstacles) - 1} more)" if len(obstacles) > 1 else ""),
            stacklevel=4,
        )
    with FolderWriter(folder) as writer:
        write_config(base, writer, settings or own_config(base, names))
        specs = [
            Spec(name, tensor.dtype, tuple(tensor.shape))
            for name, tensor in write(base, names, replace and unchanged)
        ]
        single = SINGLE if settings is not None else OWN_SINGLE
        writer.tensors(specs, single=single, max_shard_size=limit)
        for name, tensor in write(base, names, replace):
            writer.put(name, tensor)
        write_beside(base, writer)


def saved_names(base: Base) -> dict[str, str]:
    """Names of the model's saved parameters and buffers, with their store keys; a tied weight has one."""
    model, keys = base.skeleton.model, base.skeleton.keys
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = names_not_saved(model)
    chosen: dict[str, str] = {}
    for name in model.state_dict():
        if name not in ignored:
            key = keys[name]
            if key not in chosen or chosen[key] in tied:
                chosen[key] = name
    return {name: key for key, name in chosen.items()}


def bitsandbytes_config(
    base: Base, names: dict[str, str]
) -> tuple[BitsAndBytesConfig | None, list[str]]:
    """The config with which transformers would hold exactly this model in 4 bits, or why there is none."""
    model, q = base.skeleton.model, base.config.quantization
    sites = base.quantized_sites()
    by_key = {key: name for name, key in names.items()}
    linears = {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear or isinstance(module, Conv1D)
    }
    obstacles = []
    if not isinstance(base.scheme, FourBit):
        obstacles.append(f"{q.quant_type!r} is no 4-bit type")
    quantized = set()
    for key, site in sites.items():
        path, _, leaf = by_key[key].rpartition(".")
        module = linears.get(path)
        shape = tuple(model.get_parameter(by_key[key]).shape)
        if module is None or leaf != "weight":
            what = (
                f"a {type(model.get_submodule(path)).__name__}"
                if site.kind != "parameter"
                else "no module"
            )
            obstacles.append(f"{by_key[key]}, which is the weight of {what}, cannot be in 4 bits")
        elif site.layout != bitsandbytes_layout(shape, isinstance(module, Conv1D)):
            obstacles.append(f"{by_key[key]} cannot be stored transposed")
        else:
            quantized.add(path)
    for group in plan_back(model, [by_key[key] for key in sites]):
        if group.single is None:
            obstacles.append(
                f"{group.sources[0][0]} in 4 bits cannot be converted to {group.first}"
            )
    dense = [path for path in linears if path not in quantized]
    for skip in (None, dense):
        if would_quantize(model, linears, skip) == quantized:
            break
    else:
        obstacles.append("the list of dense modules cannot be said")
    if obstacles:
        return None, obstacles
    return (
        BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skip,
            bnb_4bit_compute_dtype=base.config.compute_dtype,
            bnb_4bit_quant_type=q.quant_type,
            bnb_4bit_use_double_quant=q.double_quant,
            bnb_4bit_quant_storage=q.storage_dtype,
        ),
        [],
    )


def own_config(base: Base, names: dict[str, str]) -> dict[str, Any]:
    q = base.config.quantization
    sites = base.quantized_sites()
    return {
        "quant_method": OWN_METHOD,
        "version": 1,
        "quant_type": q.quant_type,
        "blocksize": q.blocksize,
        "double_quant": q.double_quant,
        "quant_storage": plain(q.storage_dtype),
        "compute_dtype": plain(base.config.compute_dtype),
        "also_quantize": sorted(base.config.also_quantize),
        "weights": {
            name: {
                "shape": list(sites[key].shape),
                "dtype": plain(base.store.quantized[key].dtype),
            }
            for name, key in names.items()
            if key in sites
        },
    }


def plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


DESCRIPTION = 512
"""Bytes of a weight's description in JSON, filled up with spaces: its length is known before its values are."""


def as_bitsandbytes(
    base: Base, names: dict[str, str], replace: Replace | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under the names of a checkpoint; those of weights in 4 bits with their companions."""
    model, store, sites = base.skeleton.model, base.store, base.quantized_sites()
    for group in plan_back(model, names):
        name = group.sources[0][0]
        key = names[name]
        if key not in sites:
            yield from group.convert(lambda n: store[names[n]].detach(), model).items()
            continue
        d = store.quantized[key]
        parts = (replace(name) if replace is not None else None) or store.parts(key)
        yield group.first, parts[PACKED]
        for part, tensor in d.scheme.to_state(parts, d.shape, d.dtype).items():
            if "quant_state" in part and replace is not None:
                spaces = torch.full((DESCRIPTION - tensor.numel(),), ord(" "), dtype=torch.uint8)
                tensor = torch.cat([tensor.cpu(), spaces])
            yield f"{group.first}.{part}", tensor


def as_ours(
    base: Base, names: dict[str, str], replace: Replace | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors under the model's names, with the parts of weights in 4 bits."""
    store, sites = base.store, base.quantized_sites()
    for name, key in names.items():
        if key not in sites:
            yield name, store[key]
            continue
        parts = (replace(name) if replace is not None else None) or store.parts(key)
        for part, described in store.quantized[key].parts.items():
            if not described.shared:
                yield part_key(name, part, described), parts[part]


def write_config(
    base: Base, writer: FolderWriter, quantization: BitsAndBytesConfig | dict[str, Any] | None
) -> None:
    """``config.json`` as ``save_pretrained`` would write it, with or without a ``quantization_config``."""
    model = base.skeleton.model
    config = copy.deepcopy(model.config)
    config.dtype = plain(base.skeleton.dtype)
    config.architectures = [type(model).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = json.loads(config.to_json_string(use_diff=True))
    if quantization is not None:
        text["quantization_config"] = (
            quantization if isinstance(quantization, dict) else quantization.to_dict()
        )
    writer.text("config.json", json.dumps(text, indent=2, sort_keys=True) + "\n")
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        writer.text("generation_config.json", model.generation_config.to_json_string())


def write_beside(base: Base, writer: FolderWriter) -> None:
    """The tokenizer and what else lies beside the weights, where the model came from a folder."""
    folder = base.folder
    if folder is None:
        return
    for name in BESIDE:
        if (folder / name).is_file() and not (writer.scratch / name).exists():
            writer.copy(folder / name)
