"""Checkpoints that transformers + bitsandbytes saved in 4 bits: loaded byte for byte."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import CheckpointError, ConfigError
from checkpoints import EAGER, bnb_folder, tiny_mixtral
from safetensors.torch import load_file, save_file
from small_models import batch, peer_llama, tiny_gpt2
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


@pytest.mark.parametrize(
    ("kind", "double", "storage"),
    [
        *itertools.product(("nf4", "fp4"), (True, False), ("uint8",)),
        ("nf4", True, "bfloat16"),
        ("fp4", False, "float32"),
        ("nf4", False, "float16"),
    ],
)
def test_a_4bit_checkpoint_of_transformers_keeps_its_bytes(
    kind: str, double: bool, storage: str, tmp_path: Path
) -> None:
    folder = bnb_folder(
        peer_llama(1),
        tmp_path / "m",
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    file = load_file(folder / "model.safetensors")
    ours = {k: v for k, v in qmodel.base.store.root.state_dict().items() if "lora_" not in k}
    assert ours.keys() == file.keys()
    for key, tensor in file.items():
        if "quant_state" in key:  # JSON; keys may be in another order
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(tensor.tolist()))
            continue
        assert ours[key].dtype == tensor.dtype, key
        assert torch.equal(
            ours[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
        ), key
    reference = AutoModelForCausalLM.from_pretrained(folder)
    inputs = batch()
    with torch.no_grad():  # not in eval mode: a note in FACTS; there is no dropout
        theirs = reference.train()(**inputs).logits
        logits = qmodel(**inputs, return_logits=True).logits
    torch.testing.assert_close(logits, theirs, rtol=1e-4, atol=1e-5)


def test_a_4bit_conv1d_keeps_its_bytes(tmp_path: Path) -> None:
    """bitsandbytes stores GPT-2's weights transposed, as they multiply."""
    dense = tiny_gpt2()
    folder = bnb_folder(dense, tmp_path / "m", bnb_4bit_quant_type="nf4")
    qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    file = load_file(folder / "model.safetensors")
    key = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(qmodel.base.store[key], file[key])
    assert torch.equal(qmodel.base.store[f"{key}.absmax"], file[f"{key}.absmax"])
    for n, site in qmodel.base.sites.items():
        assert site.quantize == (n != "lm_head"), n


def test_experts_that_the_checkpoint_has_dense_are_quantized_on_the_way(tmp_path: Path) -> None:
    folder = bnb_folder(
        tiny_mixtral(),
        tmp_path / "m",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["lm_head", "k_proj"],
    )
    qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    rows = {row.name: row for row in qlora_fx.explain(qmodel)}
    assert rows["model.layers.0.mlp.experts.gate_up_proj"].quantized
    assert rows["model.layers.0.self_attn.q_proj"].quantized
    assert not rows["model.layers.0.self_attn.k_proj"].quantized
    assert rows["model.layers.0.self_attn.k_proj"].reason == "dense in the checkpoint"


def test_a_head_in_4_bits_stays_so(tmp_path: Path) -> None:
    folder = bnb_folder(
        peer_llama(1), tmp_path / "m", bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["k_proj"]
    )
    qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    rows = {row.name: row for row in qlora_fx.explain(qmodel)}
    assert rows["lm_head"].quantized
    assert not rows["lm_head"].adapted


def test_settings_that_contradict_the_checkpoint_are_refused(tmp_path: Path) -> None:
    folder = bnb_folder(peer_llama(1), tmp_path / "m", bnb_4bit_quant_type="nf4")
    fp4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    with pytest.raises(ConfigError, match=r"quant_type=fp4.*stored with nf4"):
        qlora_fx.from_pretrained(folder, quantization=fp4, **EAGER)
    with pytest.raises(ConfigError, match=r"blocksize=128.*stored with 64"):
        qlora_fx.from_pretrained(folder, blocksize=128, **EAGER)
    same = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    qmodel = qlora_fx.from_pretrained(folder, quantization=same, **EAGER)
    assert qmodel.compute_dtype == torch.bfloat16


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{UP}.absmax"), rf"{UP}.absmax is missing"),
        (lambda t: t.pop(f"{UP}.quant_map"), rf"{UP}.quant_map is missing"),
        (lambda t: t.pop(UP), rf"{UP}.quant_state.*describes {UP}, which is missing"),
        (lambda t: t.pop(f"{UP}.quant_state.bitsandbytes__nf4"), rf"{UP}.*"),
        (lambda t: t[f"{UP}.absmax"].fill_(torch.nan), rf"{UP} in .* has values in its absmax"),
        (
            lambda t: t[f"{UP}.quant_map"].add_(1),
            rf"{UP}.quant_map in .* is not bitsandbytes' own map",
        ),
        (lambda t: t.update({UP: t[UP][:-1].clone()}), rf"{UP} in .* needs torch.uint8"),
        (
            lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][1:].clone()}),
            rf"{UP}.absmax in .* needs",
        ),
    ],
)
def test_a_damaged_4bit_weight_is_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = bnb_folder(peer_llama(1), tmp_path / "m", bnb_4bit_quant_type="nf4")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        qlora_fx.from_pretrained(folder, **EAGER)
