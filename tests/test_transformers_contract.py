"""What is relied on of transformers' and PEFT's private names, each by itself: a new release fails here by name."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from qlora_fx.capture import export_patches
from qlora_fx.capture.export_patches import DERIVATIVES, ways
from qlora_fx.capture.skeleton import UNTRACEABLE_EXPERTS
from qlora_fx.runtime.recurrence import LIKE
from transformers import GgufConfig
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    SplitModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

LOADING = "transformers.core_model_loading"
MODEL = "transformers.modeling_utils:PreTrainedModel"
GGUF = "transformers.quantizers.quantizer_gguf:GgufHfQuantizer"
OLDER = "transformers.modeling_gguf_pytorch_utils"
READER = "transformers.integrations.gguf.reader"

SIGNATURES = {
    "transformers.trainer_utils:get_last_checkpoint": "folder",
    "transformers.trainer_utils:rotate_checkpoints": "output_dir, save_total_limit=, best_model_checkpoint=, use_mtime=",
    "transformers:Trainer.training_step": "self, model, inputs, num_items_in_batch=",
    "transformers:Trainer.compute_loss": "self, model, inputs, num_items_in_batch=",
    "transformers:Trainer.compute_loss_context_manager": "self",
    "transformers:Trainer._prepare_inputs": "self, inputs",
    "transformers:Trainer._get_output_dir": "self, trial",
    "transformers:Trainer._save_checkpoint": "self, model, trial",
    "transformers:Trainer._push_from_checkpoint": "self, checkpoint_folder",
    "transformers:Cache.update": "self, key_states, value_states, layer_idx",
    "transformers.cache_utils:DynamicLayer.update": "self, key_states, value_states",
    "transformers.cache_utils:DynamicLayer.get_seq_length": "self",
    "transformers.cache_utils:DynamicSlidingWindowLayer": "sliding_window",
    "peft.tuners.tuners_utils:check_target_module_exists": "config, key",
    "peft:PeftModel.create_or_update_model_card": "self, output_dir",
    "peft.utils:ModulesToSaveWrapper": "module_to_save, adapter_name",
    "peft.utils:ModulesToSaveWrapper.update": "self, adapter_name",
    "peft.utils.other:get_pattern_key": "pattern_keys, key_to_match",
    "transformers.conversion_mapping:get_model_conversion_mapping": "model, add_legacy=",
    f"{LOADING}:Chunk": "dim=",
    f"{LOADING}:Concatenate": "dim=",
    f"{LOADING}:MergeModulelist": "dim=",
    f"{LOADING}:SplitModulelist": "dim=",
    f"{LOADING}:Transpose": "dim0=, dim1=",
    f"{LOADING}:PrefixChange": "prefix_to_add=, prefix_to_remove=",
    f"{LOADING}:WeightConverter": "source_patterns, target_patterns, operations",
    f"{LOADING}:WeightConverter.add_tensor": "self, target_key, source_key, source_pattern, future",
    f"{LOADING}:WeightConverter.convert": "self, layer_name, model=, config=",
    f"{LOADING}:WeightConverter.reverse_transform": "self",
    f"{LOADING}:WeightConverter.was_used": "self",
    f"{LOADING}:WeightRenaming": "source_patterns, target_patterns",
    f"{LOADING}:WeightRenaming.reverse_transform": "self",
    f"{LOADING}:WeightRenaming.was_used": "self",
    f"{LOADING}:build_glob_alternation": "globs",
    f"{LOADING}:dot_natural_key": "s",
    f"{LOADING}:rename_source_key": "source_key, weight_renamings, weight_converters, base_model_prefix, meta_state_dict",
    "transformers.masking_utils:_non_vmap_expansion_sdpa": "batch_indices, head_indices, q_indices, kv_indices",
    "transformers.masking_utils:_vmap_expansion_sdpa": "mask_function",
    "transformers.integrations.moe:use_experts_implementation": "experts_class, is_transposed=",
    "transformers.quantizers.base:HfQuantizer.get_modules_to_not_convert": "model, skip_modules, keep_in_fp32_modules",
    "transformers.quantizers.quantizers_utils:should_convert_module": "full_name, patterns",
    "transformers.utils.loading_report:LoadStateDictInfo": "missing_keys=, unexpected_keys=, mismatched_keys=, "
    "error_msgs=, conversion_errors=, skipped_pp_keys=",
    "transformers.exporters.utils:apply_patches": "backend",
    "transformers.exporters.utils:precompute_export_inputs": "model, inputs",
    "transformers.utils.generic:merge_with_config_defaults": "func",
    "transformers.utils.output_capturing:capture_outputs": "func",
    f"{MODEL}.get_init_context": "dtype, is_quantized, _is_ds_init_called, allow_all_kernels",
    f"{MODEL}._from_config": "config",
    f"{MODEL}._get_dtype_plan": "self, dtype",
    f"{MODEL}.mark_tied_weights_as_initialized": "self, loading_info",
    f"{MODEL}.tie_weights": "self, missing_keys=, recompute_mapping=",
    f"{MODEL}._adjust_missing_and_unexpected_keys": "self, loading_info",
    f"{MODEL}._move_missing_keys_from_meta_to_device": "self, missing_keys, device_map, device_mesh, hf_quantizer",
    f"{MODEL}._initialize_missing_keys": "self, is_quantized",
    f"{MODEL}.get_parameter_or_buffer": "self, target",
    GGUF: "quantization_config",
    f"{GGUF}.read_header": "self, gguf_file",
    f"{GGUF}.update_dtype": "self, dtype",
    f"{GGUF}.preprocess_model": "self, model",
    f"{GGUF}.get_state_dict": "self, checkpoint_file, model",
    f"{GGUF}.update_weight_conversions": "self, weight_conversions, model | self, weight_conversions",
    f"{READER}:LazyGgufTensor": "data, ggml_type, shape",
    f"{READER}:LazyGgufTensor.__getitem__": "self, _",
    f"{OLDER}:read_field": "reader, field",
    f"{OLDER}:load_gguf_checkpoint": "gguf_checkpoint_path, return_tensors=, model_to_load=, torch_dtype=",
    f"{OLDER}:get_gguf_hf_weights_map": "hf_model, processor",
    f"{OLDER}:TensorProcessor": "config=",
    f"{OLDER}:TensorProcessor.process": "self, weights=, name=, tensor_key_mapping=, parsed_parameters=",
}
"""``module:name`` and the arguments that it is called with: by place, or by name (``=``)."""

ATTRIBUTES = {
    "peft:PeftModel": "get_base_model print_trainable_parameters get_model_status",
    "peft.tuners.lora:LoraModel": "active_adapters",
    "peft.tuners.tuners_utils:BaseTunerLayer": "adapter_layer_names _active_adapter _disable_adapters get_base_layer",
    "peft.tuners.tuners_utils:_ExcludedModule": "",
    "peft.utils.transformers_weight_conversion:_MODEL_TO_CONVERSION_PATTERN": "get",
    "peft.utils.transformers_weight_conversion:_MOE_TARGET_MODULE_MAPPING": "get",
    "transformers:AutoModelForCausalLM": "_model_mapping",
    "transformers:PretrainedConfig": "_attn_implementation _experts_implementation name_or_path",
    MODEL: "_keep_in_fp32_modules _keys_to_ignore_on_save base_model_prefix main_input_name",
    "transformers:DynamicCache": "update get_seq_length",
    "transformers:GenerationMixin": "_supports_default_dynamic_cache",
    "transformers.cache_utils:DynamicLayer": "crop reorder_cache",
    "transformers.quantizers.base:HfQuantizer": "",
    "transformers.modeling_flash_attention_utils:FlashAttentionKwargs": "__annotations__",
    "transformers.utils.generic:TransformersKwargs": "__annotations__",
    "transformers.modeling_outputs:BaseModelOutput": "last_hidden_state",
    f"{READER}:GgufHeader": "tensors data_start dtype",
    f"{READER}:TensorInfo": "name ggml_type offset nbytes",
    f"{OLDER}:TENSOR_PROCESSORS": "get",
    "transformers:DebertaForSequenceClassification": "",
    "transformers:DebertaV2ForSequenceClassification": "",
}
"""``module:name`` and the attributes that are read of it."""

MENTIONS = {
    f"{LOADING}:revert_weight_conversion": "_weight_conversions",
    f"{MODEL}.post_init": "all_tied_weights_keys",
    f"{MODEL}._initialize_missing_keys": "_is_hf_initialized",
    "transformers.masking_utils:sdpa_mask": "_vmap_expansion_sdpa",
}
"""Functions and the names by which they find what we set or replace."""

PACKAGE = Path(str(importlib.util.find_spec("qlora_fx").origin)).parent  # type: ignore[union-attr]
FENCE = PACKAGE / "transformers_internals.py"


def users(place: str) -> str:
    """The modules that come to fail with a name, for a message."""
    name = re.split(r"[:.]", place)[-1]
    reached = {name}
    for node in ast.parse(FENCE.read_text()).body:
        if isinstance(node, ast.FunctionDef) and re.search(rf"\b{name}\b", ast.unparse(node)):
            reached.add(node.name)
        if isinstance(node, ast.ImportFrom):
            reached |= {a.asname for a in node.names if a.name == name and a.asname}
    pattern = re.compile(rf"\b({'|'.join(sorted(reached))})\b")
    found = {
        str(path.relative_to(PACKAGE))
        for folder in (PACKAGE, PACKAGE / "passes", PACKAGE / "runtime")
        for path in folder.rglob("*.py")
        if path != FENCE and pattern.search(path.read_text())
    }
    return f"used by {', '.join(sorted(found)) or FENCE.name}"


def find(place: str) -> Any:
    module, _, names = place.partition(":")
    try:
        found = importlib.import_module(module)
        for name in names.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{place} is gone: {error}; {users(place)}")
    return found


def takes(signature: inspect.Signature, arguments: str) -> bool:
    """Whether a function can be called with ``"a, b, c="``, and has a and b in these places."""
    listed = arguments.split(", ")
    by_place = [a for a in listed if not a.endswith("=")]
    by_name = {a.removesuffix("="): None for a in listed if a.endswith("=")}
    try:
        signature.bind(*by_place, **by_name)
    except TypeError:
        return False
    return list(signature.parameters)[: len(by_place)] == by_place


@pytest.mark.parametrize("place", SIGNATURES)
def test_the_function_is_called_as_we_call_it(place: str) -> None:
    signature = inspect.signature(find(place))
    assert any(takes(signature, form) for form in SIGNATURES[place].split(" | ")), (
        f"{place} is called with ({SIGNATURES[place]}) and takes {signature}; {users(place)}"
    )


@pytest.mark.parametrize("place", ATTRIBUTES)
def test_the_object_has_what_we_read(place: str) -> None:
    found = find(place)
    for attribute in ATTRIBUTES[place].split():
        assert hasattr(found, attribute), f"{place} has no {attribute}; {users(attribute)}"


@pytest.mark.parametrize("place", MENTIONS)
def test_the_function_still_goes_by_the_name_that_we_set(place: str) -> None:
    name = MENTIONS[place]
    assert name in inspect.getsource(find(place)), f"{place} knows no {name}; {users(name)}"


def is_module(package: str, name: str) -> bool:
    return (
        hasattr(importlib.import_module(package), "__path__")
        and importlib.util.find_spec(f"{package}.{name}") is not None
    )


def test_every_name_that_is_imported_has_its_contract() -> None:
    known = {*SIGNATURES, *ATTRIBUTES}
    for node in ast.walk(ast.parse(FENCE.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] not in ("transformers", "peft"):
            continue
        for alias in node.names:
            if not is_module(node.module, alias.name):
                assert f"{node.module}:{alias.name}" in known


def test_a_name_that_is_gone_is_said_with_who_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(LOADING + ".dot_natural_key")
    with pytest.raises(pytest.fail.Exception, match=r"dot_natural_key is gone.*conversion\.py"):
        find(f"{LOADING}:dot_natural_key")


def test_patches_that_are_gone_are_no_error_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise ImportError("no exporters")

    monkeypatch.setattr(export_patches, "export_patches", gone)
    tries = ways()
    next(tries), next(tries)
    with pytest.raises(ImportError, match="no exporters"):
        next(tries)


def test_operations_say_along_which_dimensions() -> None:
    for kind in (Chunk, Concatenate, MergeModulelist, SplitModulelist):
        assert kind(dim=1).dim == 1
    assert (Transpose(dim0=1, dim1=2).dim0, Transpose(dim0=1, dim1=2).dim1) == (1, 2)


def test_conversions_rename_and_reverse() -> None:
    fuse = WeightConverter(["a.weight", "b.weight"], "c.weight", [Concatenate(dim=0)])
    assert (fuse.source_patterns, fuse.target_patterns) == (["a.weight", "b.weight"], ["c.weight"])
    assert rename_source_key("x.0.b.weight", [], [fuse]) == ("x.0.c.weight", "b.weight")
    split = fuse.reverse_transform()
    assert isinstance(split.operations[0], Chunk)
    assert rename_source_key("x.0.c.weight", [], [split]) == ("x.0.a.weight", "c.weight")
    renaming, unused = WeightRenaming("old", "new"), WeightRenaming("other", "another")
    assert rename_source_key("x.old.weight", [renaming, unused], []) == ("x.new.weight", None)
    assert (renaming.was_used(), unused.was_used()) == (True, False)
    assert not isinstance(renaming, WeightConverter)
    assert sorted(["x.10", "x.2"], key=dot_natural_key) == ["x.2", "x.10"]


def test_a_dtype_plan_is_searched_by_groups() -> None:
    pattern, by_group, _ = build_glob_alternation(["norm", "layers.*.gate"])
    match = pattern.search("model.layers.3.gate.weight")
    assert match is not None
    assert by_group[match.lastgroup] == "layers.*.gate"


def test_the_gguf_quantizer_starts_without_a_file() -> None:
    quantizer = GgufHfQuantizer(GgufConfig(dequantize=True, gguf_file="x.gguf"))
    assert (quantizer.supported, quantizer.header) == (False, None)


def test_importing_the_exporter_registers_patches() -> None:
    importlib.import_module("transformers.exporters.exporter_dynamo")
    assert find("transformers.exporters.utils:_PATCHES")["dynamo"], users("export_patches")


def test_peft_knows_the_old_names_of_fused_experts() -> None:
    conversion = importlib.import_module("peft.utils.transformers_weight_conversion")
    family = conversion._MODEL_TO_CONVERSION_PATTERN["mixtral"]
    assert {"w1", "w2", "w3"} <= set(conversion._MOE_TARGET_MODULE_MAPPING[family])


def test_ways_to_run_experts_have_their_names() -> None:
    assert {*UNTRACEABLE_EXPERTS, "grouped_mm"} <= {*ALL_EXPERTS_FUNCTIONS, "eager"}
    find("torch:ops.transformers.grouped_mm_fallback.default")


def test_functions_that_are_found_by_name_are_in_modeling_files() -> None:
    models = Path(transformers.__file__).parent / "models"
    sources = [path.read_text(encoding="utf-8") for path in models.rglob("modeling_*.py")]
    for name, argument in LIKE.items():
        found = [m for s in sources for m in re.findall(rf"\ndef {name}\(([^)]*)\)", s)]
        assert found, f"no model has {name}; {users(name)}"
        assert all(re.search(rf"\b{argument}\b", parameters) for parameters in found), name
    for name in DERIVATIVES:
        assert any(f"\nclass {name}(" in s for s in sources), f"no model has {name}; {users(name)}"
