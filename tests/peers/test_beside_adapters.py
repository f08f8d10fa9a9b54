"""What trains beside the adapters, and plain LoRA: numbers and files beside PEFT's own, in the same run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from oracle import with_stored_values
from peft import LoraConfig, PeftModel, get_peft_model
from qlora_fx.errors import ConfigError
from qlora_fx.testing import compare, randomize_adapter, relative_error
from safetensors.torch import load_file
from small_models import batch, peer_llama
from torch import nn

pytestmark = pytest.mark.peer
SETTINGS: dict[str, dict[str, Any]] = {
    "biases of adapted linears": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "all biases": {"bias": "all", "target_modules": ["q_proj", "down_proj"]},
    "the head as a whole": {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
    "embedding, head and biases": {
        "modules_to_save": ["embed_tokens", "lm_head"],
        "bias": "all",
        "target_modules": "all-linear",
    },
}


def settings(name: str) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, **SETTINGS[name])


def transformed(model: nn.Module, lora: LoraConfig, **options: Any) -> qlora_fx.QLoRAModel:
    qmodel = qlora_fx.transform(copy.deepcopy(model), lora, compute_dtype=torch.float32, **options)
    randomize_adapter(qmodel)
    return qmodel


def in_peft(model: nn.Module, qmodel: qlora_fx.QLoRAModel, folder: Path) -> Any:
    """PEFT's model over the same base, with the saved folder."""
    base = with_stored_values(model, qmodel)
    return PeftModel.from_pretrained(base, folder, is_trainable=True).train()


ALL_OF_IT = "embedding, head and biases"


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "aot_eager" if name == ALL_OF_IT else "eager") for name in SETTINGS),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in SETTINGS),
    ],
)
def test_gradients_of_all_that_trains_are_right(name: str, backend: str) -> None:
    model = peer_llama()
    qmodel = transformed(model, settings(name), backend=backend)
    report = compare(model, qmodel, batch())
    assert report.passed, str(report)
    trained = [line for line in report.sites if line.name in set(qmodel.base.trained.values())]
    assert trained
    assert all(line.norm > 0 for line in trained)


@pytest.mark.parametrize("quantization", [None, False])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_saved_folder_is_pefts(name: str, quantization: bool | None, tmp_path: Path) -> None:
    model = peer_llama()
    qmodel = transformed(model, settings(name), quantization=quantization, backend="eager")
    qmodel.save_pretrained(tmp_path / "ours")
    theirs = in_peft(model, qmodel, tmp_path / "ours")
    mine, other = qmodel(**batch(), return_logits=True), theirs(**batch())
    assert relative_error(mine.logits, other.logits) < 1e-5
    mine.loss.backward()
    other.loss.backward()
    names = qmodel.adapter_by_peft_name()
    theirs.save_pretrained(tmp_path / "theirs")
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert saved.keys() == names.keys()
    grads = {
        n.replace(".default", "").replace(".modules_to_save", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    for key, parameter in names.items():
        assert parameter.grad is not None, key
        torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-3, atol=1e-6)
    # And back: PEFT's folder loads here.
    again = transformed(model, settings(name), quantization=quantization, backend="eager")
    again.load_adapter(tmp_path / "theirs")
    assert relative_error(again(**batch(), return_logits=True).logits, mine.logits) < 1e-6


def test_without_the_adapter_the_base_is_as_it_was() -> None:
    model = peer_llama()
    qmodel = transformed(model, settings(ALL_OF_IT), backend="eager").eval()
    with torch.no_grad(), qmodel.disable_adapter():
        off = qmodel(**batch()).logits
    plain = transformed(model, LoraConfig(r=4), backend="eager").eval()
    with torch.no_grad(), plain.disable_adapter():
        assert torch.equal(plain(**batch()).logits, off)
    with torch.no_grad():
        assert not torch.equal(qmodel(**batch()).logits, off)


@pytest.mark.parametrize(
    "backend", [pytest.param("inductor", marks=pytest.mark.slow), "aot_eager", "eager"]
)
def test_plain_lora_has_pefts_numbers(backend: str, tmp_path: Path) -> None:
    """The same A and B over the same dense weights; nothing is in 4 bits."""
    model = peer_llama()
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    qmodel = transformed(model, lora, quantization=False, backend=backend)
    assert not any(row.quantized for row in qmodel.explain())
    assert all("quantization=False" in row.reason for row in qmodel.explain())
    assert "storage: dense" in str(qmodel.explain())
    qmodel.save_pretrained(tmp_path)
    peer: Any = get_peft_model(copy.deepcopy(model), lora)
    theirs = PeftModel.from_pretrained(peer.unload(), tmp_path, is_trainable=True).train()
    mine, other = qmodel(**batch()), theirs(**batch())
    torch.testing.assert_close(mine.loss, other.loss, rtol=1e-5, atol=0)
    mine.loss.backward()
    other.loss.backward()
    grads = {
        n.replace(".default", ""): p.grad
        for n, p in theirs.named_parameters()
        if p.grad is not None
    }
    for key, parameter in qmodel.adapter_by_peft_name().items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, grads[key], rtol=1e-3, atol=1e-6)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4


def test_merging_takes_along_what_was_trained(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = peer_llama()
    qmodel = transformed(model, settings(ALL_OF_IT), backend="eager").eval()
    qmodel.merge(tmp_path / "merged", sample=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert relative_error(qmodel(**batch()).logits, merged(**batch()).logits) < 1e-5
    with pytest.raises(ConfigError, match="requantized"):
        qmodel.merge(tmp_path / "again", mode="requantized", sample=False)


def test_a_module_that_is_not_there_is_named() -> None:
    lora = LoraConfig(r=4, modules_to_save=["classifier"])
    with pytest.raises(ConfigError, match="modules_to_save entry 'classifier'"):
        qlora_fx.transform(peer_llama(), lora, backend="eager")


def test_nothing_in_4_bits_cannot_be_saved_in_4_bits(tmp_path: Path) -> None:
    qmodel = transformed(peer_llama(), LoraConfig(r=4), quantization=False, backend="eager")
    with pytest.raises(ConfigError, match="quantization=False"):
        qmodel.save_quantized(tmp_path / "none")
    with pytest.raises(ConfigError, match="also_quantize"):
        transformed(peer_llama(), LoraConfig(r=4), quantization=False, also_quantize=["head"])
    assert not (tmp_path / "none").exists()
