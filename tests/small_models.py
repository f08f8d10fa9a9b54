"""Small models that tests build from a config, and what is captured of them; nothing is downloaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from qlora_fx.capture.skeleton import Capture, Skeleton
from qlora_fx.compiler import pipeline, printer
from qlora_fx.config import Config
from torch import fx, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCABULARY = 101


def tiny_llama(layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """Non-square linears with biases; q is 64x48, k and v 32x48, gate and up 80x48, down 48x80."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)  # zero biases would hide a lost one
    return model


def peer_llama(layers: int = 2, **changes: Any) -> LlamaForCausalLM:
    """As ``tiny_llama``, with inputs that are multiples of 64: q 128x64, k and v 32x64, up 192x64, down 64x192.

    Beside bitsandbytes' own modules no other sizes will do: on CPUs with AVX-512 its dequantization is wrong
    for rows that fill no whole blocks (a note in runtime/ops.py).
    """
    sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32, "num_key_value_heads": 1}
    return tiny_llama(layers, **(sizes | changes))


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    )
    model = GPT2LMHeadModel(config)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)
    return model


def windowed_gemma2() -> Gemma2ForCausalLM:
    """One layer, whose tokens see 4 keys."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=4,
        query_pre_attn_scalar=16,
    )
    return Gemma2ForCausalLM(config)


def batch(
    rows: int = 3, tokens: int = 21, *, padded: int = 4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random ids; the second row ends in ``padded`` masked positions."""
    ids = torch.randint(
        2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if padded and rows > 1:
        mask[1, -padded:] = 0
        labels[1, -padded:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Toy(nn.Module):
    """Two blocks of one linear each and a head: the smallest model with repeated blocks."""

    def __init__(self, blocks: int = 2, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.layers = nn.ModuleList(ToyBlock(bias) for _ in range(blocks))
        self.head = nn.Linear(8, 5, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        return {"y": self.head(x)}


class ToyBlock(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6, bias=bias)
        self.down = nn.Linear(6, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.relu(self.up(x)))
        return y


TOY_INPUT = {"x": torch.zeros(2, 3, 8)}


def captured(model: nn.Module | None = None, inputs: Any = None, **options: Any) -> Capture:
    """A capture of ``model`` (default: ``Toy``) for pass tests."""
    settings = {"training": True, "dtype": torch.float32} | options
    return Skeleton(model or Toy()).capture(inputs or TOY_INPUT, **settings)


def graph(model: nn.Module, inputs: Any, config: Config, last: Any) -> fx.GraphModule:
    """The graph before the pass ``last``."""
    gm = captured(model, inputs).gm
    for stage in pipeline.PIPELINE:
        if stage.run is last:
            return gm
        gm = stage.run(gm, config=config).graph_module
    raise AssertionError(last)


def excerpt(gm: fx.GraphModule, *words: str) -> str:
    """The lines of the graph that have one of the words, unindented."""
    lines = printer.text(gm).splitlines()
    return "\n".join(line.strip() for line in lines if any(word in line for word in words)) + "\n"
