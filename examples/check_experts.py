"""What becomes of a mixture of experts, and whether it is right: a small random Mixtral.

    python examples/check_experts.py

Prints the table of all linears (experts quantized and adapted, routers dense), then one training step beside
float64 with the error after each stage of the compiler. The same for your own model and batch:
``qlora_fx.testing.check(model, batch)``.
"""

from __future__ import annotations

import sys

import qlora_fx
import torch
from peft import LoraConfig
from transformers import MixtralConfig, MixtralForCausalLM


def main() -> int:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    )
    model = MixtralForCausalLM(config)
    ids = torch.randint(1, 128, (2, 24))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    report = qlora_fx.testing.check(model, batch, lora, stages=True)
    print()
    print(qlora_fx.explain(qlora_fx.transform(model, lora, compute_dtype=torch.float32)))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
