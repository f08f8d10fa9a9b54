"""What qlora_fx uses of transformers and PEFT that is not their public API, all of it and only here.

Either library may change it in any release. ``tests/test_transformers_contract.py`` checks each name with what is
relied on and says who uses it; ``tested_versions.py`` has the releases with which that passed. Readers of GGUF files
and the patches for export are imported when they are needed: they bring much with them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peft.tuners.lora import (
    LoraModel,  # what Tuner is to isinstance; none of its state is used but model, peft_config, active_adapter
)
from peft.tuners.tuners_utils import (
    BaseTunerLayer,  # what AdaptedLayer is to isinstance; adapter_layer_names, _active_adapter, _disable_adapters
    check_target_module_exists,  # (config, name): truthy for a target, an _ExcludedModule for what is excluded
)
from peft.tuners.tuners_utils import (
    _ExcludedModule as ExcludedModule,  # what check_target_module_exists says of excluded modules
)
from peft.utils import (
    ModulesToSaveWrapper,  # (module, adapter name): a copy in .modules_to_save[name] beside .original_module
)
from peft.utils.other import (
    get_pattern_key,  # (patterns, name): the pattern that matches, else the name
)
from peft.utils.transformers_weight_conversion import (
    _MODEL_TO_CONVERSION_PATTERN,  # model type to the family whose conversions it has
    _MOE_TARGET_MODULE_MAPPING,  # family to {leaf of an old expert: fused parameter}
)
from transformers import masking_utils
from transformers.cache_utils import (
    DynamicLayer,  # a cache's layer: .keys and .values [batch, heads, tokens, size], .is_initialized; GrowingLayer is one
    DynamicSlidingWindowLayer,  # the same with tokens of a window only
)
from transformers.conversion_mapping import (
    get_model_conversion_mapping,  # (model, add_legacy=): its WeightRenamings and WeightConverters, in order
)
from transformers.core_model_loading import (
    Chunk,  # operation: splits a tensor along .dim
    Concatenate,  # operation: joins tensors along .dim
    MergeModulelist,  # operation: stacks a list along a new .dim
    PrefixChange,  # the WeightRenaming that depends on what was loaded
    SplitModulelist,  # operation: a stack along .dim to a list
    Transpose,  # operation: swaps .dim0 and .dim1
    WeightConverter,  # .source_patterns, .target_patterns, .operations; add_tensor, convert, reverse_transform
    WeightRenaming,  # the same without operations; was_used
    build_glob_alternation,  # (globs): a pattern with a group per glob, and the glob of each group
    dot_natural_key,  # (name): sorts layers.2 before layers.10
    rename_source_key,  # (name, renamings, converters, prefix, state dict): new name, pattern of a converter
)
from transformers.integrations import (
    moe as _moe,  # noqa: F401 (registers transformers::grouped_mm_fallback)
)
from transformers.masking_utils import (
    _non_vmap_expansion_sdpa as broadcast_indices,  # (batch, head, query, key): each shaped to broadcast
)
from transformers.modeling_flash_attention_utils import (
    FlashAttentionKwargs,  # a TypedDict of keywords that forwards hand on
)
from transformers.modeling_outputs import (
    BaseModelOutput,  # what an encoder returns: .last_hidden_state
)
from transformers.quantizers.base import (
    HfQuantizer,  # get_modules_to_not_convert(model, skip, kept in float32)
)
from transformers.quantizers.quantizers_utils import (
    should_convert_module,  # (name, patterns): whether no pattern excludes it
)
from transformers.utils.generic import TransformersKwargs  # a TypedDict, as FlashAttentionKwargs
from transformers.utils.loading_report import (
    LoadStateDictInfo,  # .missing_keys and .unexpected_keys, which loading changes in place
)

__all__ = [
    "FORWARD_KEYWORDS",
    "BaseModelOutput",
    "BaseTunerLayer",
    "Chunk",
    "Concatenate",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "ExcludedModule",
    "LoraModel",
    "MergeModulelist",
    "ModulesToSaveWrapper",
    "PrefixChange",
    "SplitModulelist",
    "Transpose",
    "WeightConverter",
    "WeightRenaming",
    "as_tower",
    "attention_implementation",
    "broadcast_indices",
    "build_on_meta",
    "check_target_module_exists",
    "conversions_used",
    "counts_of_grid",
    "dot_natural_key",
    "experts_implementation",
    "export_patches",
    "fused_expert_names",
    "get_model_conversion_mapping",
    "get_pattern_key",
    "gguf_conversions",
    "gguf_quantizer",
    "grouped_mm_fallback",
    "is_model_class",
    "kept_dtypes",
    "lazy_gguf_tensor",
    "masks_expanded_by",
    "model_mapping",
    "names_not_saved",
    "older_gguf_reader",
    "rename_source_key",
    "set_conversions_used",
    "set_experts_implementation",
    "tie_and_initialize",
    "would_quantize",
]

grouped_mm_fallback = torch.ops.transformers.grouped_mm_fallback.default
"""``(input [rows, in], weight [experts, in, out], offs [experts])``: what experts run where PyTorch's product is not."""
FORWARD_KEYWORDS = frozenset(
    {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__}
)
"""Keywords that every forward of transformers hands on through its ``**kwargs``."""


# -- classes and configs --------------------------------------------------------------------------


def model_mapping(kind: Any) -> Any:
    """Config class to model class, of an Auto class; None for other classes."""
    return getattr(kind, "_model_mapping", None)


def is_model_class(kind: Any) -> bool:
    """True for a class that builds models from a config."""
    return hasattr(kind, "_from_config")


def attention_implementation(config: Any) -> str | None:
    """How the model runs attention: "eager", "sdpa", ..."""
    found: str | None = getattr(config, "_attn_implementation", None)
    return found


def experts_implementation(config: Any) -> str | None:
    """How the model runs its experts: "eager", "grouped_mm", ..."""
    found: str | None = getattr(config, "_experts_implementation", None)
    return found


def set_experts_implementation(config: Any, name: str) -> None:
    config._experts_implementation = name


# -- building a model without weights -------------------------------------------------------------


def build_on_meta(kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device, its weights not tied, as ``from_pretrained`` builds it."""
    with contextlib.ExitStack() as stack:
        for context in kind.get_init_context(dtype, False, False, None):
            stack.enter_context(context)
        return kind(config)


def kept_dtypes(model: Any, dtype: torch.dtype, names: Iterable[str]) -> dict[str, torch.dtype]:
    """Those of ``names`` that transformers loads in another dtype than ``dtype``."""
    wanted = model._get_dtype_plan(dtype)
    if not wanted:
        return {}
    pattern, by_group, _ = build_glob_alternation(list(wanted))
    found = {name: pattern.search(name) for name in names}
    return {name: wanted[by_group[m.lastgroup]] for name, m in found.items() if m is not None}


def tie_and_initialize(
    model: Any,
    loaded: Iterable[torch.Tensor],
    missing: set[str],
    unexpected: set[str],
    device: torch.device,
) -> tuple[set[str], set[str]]:
    """The end of transformers' loading: tie weights, and give values to what no checkpoint holds.

    Args:
        loaded: the tensors that a checkpoint holds: they stay as they are.
        missing, unexpected: names that it does not hold, and that the model does not have.
        device: where values are made.

    Returns:
        ``missing`` and ``unexpected`` by the model's own rules. Where something is missing, nothing was initialized.
    """
    for tensor in loaded:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(unexpected),
        mismatched_keys=set(),
        error_msgs=[],
        conversion_errors={},
        skipped_pp_keys=set(),
    )
    model.mark_tied_weights_as_initialized(info)
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    optional = set(info.missing_keys)
    model._adjust_missing_and_unexpected_keys(info)
    optional -= info.missing_keys
    if not info.missing_keys:
        model._move_missing_keys_from_meta_to_device(optional, {"": device}, None, None)
        model._initialize_missing_keys(False)
    return info.missing_keys, info.unexpected_keys


# -- checkpoints ----------------------------------------------------------------------------------


def conversions_used(model: Any) -> list[Any] | None:
    """The conversions that loading used, which saving reverses; None for a model that was not loaded."""
    found: list[Any] | None = getattr(model, "_weight_conversions", None)
    return found


def set_conversions_used(model: Any, conversions: list[Any] | None) -> None:
    model._weight_conversions = conversions


def names_not_saved(model: Any) -> Iterable[str]:
    """Names of the state dict that ``save_pretrained`` leaves out."""
    return getattr(model, "_keys_to_ignore_on_save", None) or ()


def would_quantize(model: Any, names: Iterable[str], skip: list[str] | None) -> set[str]:
    """Those of the modules ``names`` that transformers quantizes with ``llm_int8_skip_modules=skip``."""
    skipped = HfQuantizer.get_modules_to_not_convert(model, skip, model._keep_in_fp32_modules)
    return {name for name in names if should_convert_module(name, skipped)}


def fused_expert_names(model_type: str | None) -> frozenset[str]:
    """Leaf names of modules that PEFT takes for the fused experts of a model of this type."""
    family = _MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return frozenset(_MOE_TARGET_MODULE_MAPPING.get(family, ()))


# -- GGUF -----------------------------------------------------------------------------------------


def gguf_quantizer(config: Any) -> Any:
    """What loads a GGUF file: ``read_header``, then ``supported`` says whether the lazy reader takes it, ``header``
    what is in it; ``update_dtype``, ``preprocess_model``, ``get_state_dict``.
    """
    from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

    return GgufHfQuantizer(config)


def gguf_conversions(quantizer: Any, model: Any) -> list[Any]:
    """How the file's tensors become parameters. transformers 5.17 does not take the model."""
    convert = quantizer.update_weight_conversions
    found: list[Any] = (
        convert([], model) if "model" in inspect.signature(convert).parameters else convert([])
    )
    return found


def lazy_gguf_tensor() -> Any:
    """``LazyGgufTensor(bytes, type, shape)``; ``[...]`` reads it: values, or blocks as bytes."""
    from transformers.integrations.gguf.reader import LazyGgufTensor

    return LazyGgufTensor


def older_gguf_reader() -> Any:
    """The module of the reader for architectures that the lazy one does not take: ``read_field``,
    ``TENSOR_PROCESSORS``, ``TensorProcessor``, ``load_gguf_checkpoint``, ``get_gguf_hf_weights_map``.
    """
    from transformers import modeling_gguf_pytorch_utils

    return modeling_gguf_pytorch_utils


# -- trainers ---------------------------------------------------------------------------------------


def last_checkpoint(folder: Any) -> str | None:
    """The trainer's checkpoint of the most steps in a folder; None where there is none, or no folder."""
    from transformers.trainer_utils import get_last_checkpoint

    found: str | None = get_last_checkpoint(folder) if folder and os.path.isdir(folder) else None
    return found


def remove_older_checkpoints(
    folder: str, limit: int | None, best: str | None, remove: Callable[[Path], None]
) -> None:
    """Keep as many of a trainer's checkpoints as it keeps; ``remove`` takes one away, for which it has ``shutil.rmtree``."""
    from transformers import trainer_utils

    def rmtree(path: str, ignore_errors: bool) -> None:
        remove(Path(path))

    with mock.patch.object(trainer_utils, "shutil", SimpleNamespace(rmtree=rmtree)):
        trainer_utils.rotate_checkpoints(
            folder, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True
        )


# -- capture --------------------------------------------------------------------------------------


def masks_expanded_by(expansion: Callable[[Any], Any]) -> contextlib.AbstractContextManager[Any]:
    """Let ``expansion(function)(batch, head, query, key)`` evaluate masks of index functions, in vmap's place."""
    return mock.patch.object(masking_utils, "_vmap_expansion_sdpa", expansion)


def counts_of_grid(tower: Any, grid: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a vision tower computes in Python from ``grid_thw [pictures, 3]``, by the names under which it takes it.

    Ends of pictures and windows, positions of patches, indices into tables of positions.
    """
    from transformers.exporters.utils import precompute_export_inputs

    values: dict[str, Any] = {"grid_thw": grid}
    precompute_export_inputs(tower, values)
    return {k: t for k, t in values.items() if k != "grid_thw" and isinstance(t, torch.Tensor)}


def as_tower(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A vision tower's forward with what transformers puts around those: defaults of its config, hidden states collected."""
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import capture_outputs

    wrapped: Callable[..., Any] = merge_with_config_defaults(capture_outputs(forward))
    return wrapped


def export_patches() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """transformers' patches for export, of models that torch.export cannot follow: what puts them in place."""
    from transformers.exporters import exporter_dynamo  # noqa: F401 (registers the patches)
    from transformers.exporters.utils import apply_patches

    return functools.partial(apply_patches, "dynamo")
