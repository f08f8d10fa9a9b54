"""Experts beside PEFT's ``target_parameters``: the same numbers, gradients and folders, both ways.

bitsandbytes leaves experts dense, so PEFT runs on a copy whose weights are what the 4-bit storage stands for.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from families import FAMILIES, build
from peft import LoraConfig, PeftModel, get_peft_model
from qlora_fx.testing.check import dense_weights, randomize_adapter, relative_error
from safetensors.torch import load_file
from slow import only_slow_but

pytestmark = pytest.mark.peer

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TYPES = ("mixtral", "gpt_oss", "llama4_text", "jetmoe", "qwen2_moe")
"""Weights as [experts, out, in], as [experts, in, out] and marked so, unmarked, in 2-D modules, beside a shared one."""


def pair(model_type: str) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """Our model with a random adapter, a dense copy of the same base, and a batch."""
    family = next(f for f in FAMILIES if f.model_type == model_type)
    model, batch = build(family).train(), family.batch(3, 21)
    qmodel = qlora_fx.transform(
        copy.deepcopy(model),
        LoraConfig(**LORA),
        compute_dtype=torch.float32,
        example_inputs=batch,
        backend="eager",
    )
    randomize_adapter(qmodel)
    dense = dense_weights(model, qmodel.base)
    with torch.no_grad():
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in dense:
                parameter.copy_(dense[name])
    model.set_experts_implementation("eager")
    model.config.use_cache = False
    return qmodel, model, batch


def loaded(base: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder, is_trainable=True).train()


@pytest.mark.parametrize("model_type", only_slow_but(("mixtral", "gpt_oss"), TYPES))
def test_saved_here_loaded_by_peft_with_the_same_gradients(model_type: str, tmp_path: Path) -> None:
    qmodel, base, batch = pair(model_type)
    qmodel.save_pretrained(tmp_path)
    theirs = loaded(base, tmp_path)
    params = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if "lora_" in n}
    assert params.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    shown = {n: p for n, p in qmodel.named_parameters() if p.requires_grad}
    assert shown.keys() == {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {id(p) for p in shown.values()} == {id(p) for _, p in qmodel.adapter_parameters()}
    out, their_out = qmodel(**batch, return_logits=True), theirs(**batch)
    assert relative_error(out.logits, their_out.logits) < 1e-6
    out.loss.backward()
    their_out.loss.backward()
    mine = qmodel.adapter_by_peft_name()
    largest = max(float(p.grad.norm()) for p in params.values())
    for name, p in params.items():
        distance = float((mine[name].grad - p.grad).norm())
        assert distance < 1e-4 * float(p.grad.norm()) + 1e-9 * largest, name


def test_saved_by_peft_loaded_here(tmp_path: Path) -> None:
    _, base, batch = pair("mixtral")
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs: Any = get_peft_model(base, lora).train()
    theirs.save_pretrained(tmp_path)
    family = next(f for f in FAMILIES if f.model_type == "mixtral")
    ours = qlora_fx.transform(
        build(family),
        LoraConfig.from_pretrained(tmp_path),
        compute_dtype=torch.float32,
        backend="eager",
    )
    with torch.no_grad():
        before = ours(**batch, return_logits=True).logits
        ours.load_adapter(tmp_path)
        assert (
            relative_error(ours(**batch, return_logits=True).logits, theirs(**batch).logits) < 1e-6
        )
        assert relative_error(before, ours(**batch, return_logits=True).logits) > 1e-3


def test_the_saved_config_names_parameters(tmp_path: Path) -> None:
    qmodel, _, _ = pair("mixtral")
    qmodel.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
