"""Folders that the tests of loading, saving and merging start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from small_models import VOCABULARY, tiny_gpt2, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig, MixtralForCausalLM

EAGER: dict[str, Any] = {"backend": "eager", "progress": False}


def tiny_mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


MODELS = {
    "llama": tiny_llama,
    "tied": lambda: tiny_llama(1, tie_word_embeddings=True),
    "gpt2": tiny_gpt2,
    "mixtral": tiny_mixtral,
    "bfloat16": lambda: tiny_llama(1).bfloat16(),
}


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def assert_same_store(ours: Any, other: Any) -> None:
    """Byte for byte, but for the adapters, which are random."""
    ours, other = (dict(m.base.store.items()) for m in (ours, other))
    assert ours.keys() == other.keys()
    for key, tensor in ours.items():
        assert tensor.dtype == other[key].dtype, key
        assert isinstance(tensor, nn.Parameter) == isinstance(other[key], nn.Parameter), key
        if "lora_" not in key:
            one, two = (t.detach().reshape(-1).view(torch.uint8) for t in (tensor, other[key]))
            assert torch.equal(one, two), key


def bnb_folder(model: Any, folder: Path, **settings: Any) -> Path:
    """The model as transformers + bitsandbytes saves it in 4 bits."""
    dense = folder.with_name(f"{folder.name}-dense")
    model.save_pretrained(dense)
    config = BitsAndBytesConfig(load_in_4bit=True, **settings)
    AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(folder)
    return folder
