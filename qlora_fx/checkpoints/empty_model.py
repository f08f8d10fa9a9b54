"""A transformers model without weights, as ``from_pretrained`` would build it before it loads any."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from ..capture.skeleton import named_tensors
from ..errors import CheckpointError, ConfigError
from ..transformers_internals import (
    build_on_meta,
    is_model_class,
    kept_dtypes,
    model_mapping,
    tie_and_initialize,
)
from .locate import Source

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def read_config(source: Source) -> PretrainedConfig:
    """The transformers config of a source, without its quantization_config."""
    options = {"gguf_file": source.gguf.name} if source.gguf is not None else {}
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False, **options)
    except (ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{source.name!r} has no config that transformers reads: {error}"
        ) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.name_or_path = source.name
    return config


def find_class(config: PretrainedConfig, model_class: Any) -> Any:
    """The class to build: the one asked for, or the one that the config names.

    Raises:
        ConfigError: it is no class of transformers'.
    """
    if model_class is not None:
        mapping = model_mapping(model_class)
        if mapping is not None:
            if type(config) not in mapping:
                raise ConfigError(
                    f"{model_class.__name__} has no model for a {type(config).__name__}"
                )
            return mapping[type(config)]
        if not is_model_class(model_class):
            raise ConfigError(
                f"model_class={model_class!r}; accepted: a model class of transformers, or an Auto class"
            )
        return model_class
    names = list(getattr(config, "architectures", None) or [])
    if not names:
        mapping = model_mapping(transformers.AutoModelForCausalLM)
        if type(config) in mapping:
            return mapping[type(config)]
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise ConfigError(
            f"config.architectures is {names}; accepted: a class of transformers {transformers.__version__}, "
            "or pass model_class="
        )
    return found


def choose_dtype(config: PretrainedConfig, dtype: Any, found: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of the model: the one asked for; "auto" is the config's, or else the checkpoint's first float.

    Raises:
        ConfigError: it is no dtype that models have.
    """
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or next(
            (d for d in found if d.is_floating_point), torch.float32
        )
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in FLOATS:
        raise ConfigError(f"dtype={dtype!r}; accepted: 'auto', {', '.join(map(str, FLOATS))}")
    config.dtype = dtype
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            getattr(config, name).dtype = dtype
    chosen: torch.dtype = dtype
    return chosen


def build(
    config: PretrainedConfig, kind: Any, dtype: torch.dtype, source: Source | None = None
) -> Any:
    """The model on the meta device, not tied, each parameter in the dtype it will have."""
    model = build_on_meta(kind, config, dtype)
    tensors = dict(named_tensors(model))
    for name, wanted in kept_dtypes(model, dtype, tensors).items():
        if tensors[name].is_floating_point():
            put(model, name, tensors[name].to(wanted))
    saved = source.folder / "generation_config.json" if source is not None else None
    if saved is not None and saved.is_file() and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(saved.parent)
    return model


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def complete(
    model: Any, missing: set[str], unexpected: set[str], device: torch.device
) -> tuple[set[str], set[str]]:
    """Tie weights, and give values to what a checkpoint does not hold, with transformers' own functions.

    Non-persistent buffers (``inv_freq``), and parameters that the model class allows to be missing, are made
    on ``device`` and initialized; everything else stays on the meta device.

    Returns:
        The names that are missing, and those that are unexpected, by the model's own rules.
    """
    loaded = [tensor for name, tensor in named_tensors(model) if name not in missing]
    found = tie_and_initialize(model, loaded, missing, unexpected, device)
    model.eval()
    return found
