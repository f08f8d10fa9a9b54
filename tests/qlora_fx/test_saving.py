"""save_quantized: what transformers + bitsandbytes load, and our own format where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import ConfigError
from checkpoints import EAGER, MODELS, assert_same_store, bnb_folder, save, tiny_mixtral
from peft import LoraConfig
from safetensors.torch import load_file
from slow import only_slow_but
from small_models import batch, peer_llama, tiny_gpt2, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def base_logits(qmodel: Any) -> torch.Tensor:
    with qmodel.disable_adapter(), torch.no_grad():
        logits: torch.Tensor = qmodel(**batch(), return_logits=True).logits
    return logits


@pytest.mark.parametrize(
    ("kind", "double", "storage"),
    [("nf4", True, "uint8"), ("fp4", True, "uint8"), ("nf4", False, "bfloat16")],
)
def test_transformers_loads_what_is_saved_and_gives_the_same_logits(
    kind: str, double: bool, storage: str, tmp_path: Path
) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )
    qmodel = qlora_fx.transform(peer_llama(1), quantization=settings, backend="eager")
    qmodel.save_quantized(tmp_path / "q", max_shard_size="20KB")
    assert (tmp_path / "q" / "model.safetensors.index.json").is_file()
    reference, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        theirs = reference.train()(**batch()).logits
    torch.testing.assert_close(base_logits(qmodel), theirs, rtol=1e-4, atol=1e-5)
    again = qlora_fx.from_pretrained(tmp_path / "q", **EAGER)
    assert_same_store(again, qmodel)


@pytest.mark.parametrize(
    "build", [lambda: peer_llama(1), tiny_gpt2, lambda: peer_llama(1, tie_word_embeddings=True)]
)
def test_what_transformers_saved_is_saved_again_with_the_same_files(
    build: Any, tmp_path: Path
) -> None:
    folder = bnb_folder(build(), tmp_path / "theirs", bnb_4bit_quant_type="nf4")
    qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    qmodel.save_quantized(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        if "quant_state" in key:
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(tensor.tolist())), key
        else:
            assert torch.equal(ours[key], tensor), key
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("theirs", "ours")]
    compute = [c["quantization_config"].pop("bnb_4bit_compute_dtype") for c in configs]
    assert compute == ["float32", "float32"]
    assert configs[0] == configs[1]
    generation = [
        json.loads((tmp_path / f / "generation_config.json").read_text())
        for f in ("theirs", "ours")
    ]
    assert generation[0] == generation[1]


def test_other_blocksizes_are_in_the_description_and_transformers_honours_it(
    tmp_path: Path,
) -> None:
    model = peer_llama(
        hidden_size=128, intermediate_size=256
    )  # rows of whole blocks: a note in runtime/ops.py
    qmodel = qlora_fx.transform(model, blocksize=128, backend="eager")
    qmodel.save_quantized(tmp_path / "q")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        theirs = reference.train()(**batch()).logits
    torch.testing.assert_close(base_logits(qmodel), theirs, rtol=1e-4, atol=1e-5)
    assert_same_store(qlora_fx.from_pretrained(tmp_path / "q", **EAGER), qmodel)


def test_a_head_in_4_bits_is_said_in_the_config(tmp_path: Path) -> None:
    qmodel = qlora_fx.transform(peer_llama(1), also_quantize=["head"], backend="eager")
    qmodel.save_quantized(tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == []
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    with torch.no_grad():
        theirs = reference.train()(**batch()).logits
    torch.testing.assert_close(base_logits(qmodel), theirs, rtol=1e-4, atol=1e-5)


OWN = {
    "experts": (tiny_mixtral, {}),
    "embeddings": (lambda: tiny_llama(1), {"also_quantize": ["embeddings"]}),
    "tied": (MODELS["tied"], {"also_quantize": ["head", "embeddings"]}),
    "routers": (
        tiny_mixtral,
        {
            "also_quantize": ["routers"],
            "blocksize": 32,
            "quantization": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
        },
    ),
}


@pytest.mark.parametrize("name", only_slow_but(["routers", "tied"], OWN))
def test_what_bitsandbytes_cannot_say_is_saved_in_a_format_that_loads_here(
    name: str, tmp_path: Path
) -> None:
    build, options = OWN[name]
    qmodel = qlora_fx.transform(build(), backend="eager", **options)
    with pytest.warns(
        UserWarning,
        match="own format, which qlora_fx.from_pretrained loads and transformers does not",
    ):
        qmodel.save_quantized(tmp_path / "q", max_shard_size="20KB")
    again = qlora_fx.from_pretrained(tmp_path / "q", **EAGER)
    assert_same_store(again, qmodel)
    assert torch.equal(base_logits(again), base_logits(qmodel))
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "q")


def test_the_tokenizer_of_the_source_is_copied(tmp_path: Path) -> None:
    folder = save(peer_llama(1), tmp_path / "m")
    (folder / "tokenizer.json").write_text('{"any": "thing"}')
    qmodel = qlora_fx.from_pretrained(folder, **EAGER)
    qmodel.save_quantized(tmp_path / "q")
    assert (tmp_path / "q" / "tokenizer.json").read_text() == '{"any": "thing"}'


def test_the_adapter_fits_what_was_saved(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    qmodel = qlora_fx.transform(peer_llama(1), lora, backend="eager")
    qmodel.save_quantized(tmp_path / "base")
    qmodel.save_pretrained(tmp_path / "adapter")
    again = qlora_fx.from_pretrained(tmp_path / "base", lora, **EAGER)
    again.load_adapter(tmp_path / "adapter")
    with torch.no_grad():
        one, other = (m.eval()(**batch()).logits for m in (qmodel, again))
    assert torch.equal(one, other)


def test_a_shard_size_that_is_none_is_refused(tmp_path: Path) -> None:
    qmodel = qlora_fx.transform(peer_llama(1), backend="eager")
    for size in ("5", "GB", 0, -1, "0MB", None):
        with pytest.raises(ConfigError, match="max_shard_size"):
            qmodel.save_quantized(tmp_path / "q", max_shard_size=size)  # type: ignore[arg-type]
    assert not (tmp_path / "q").exists()
