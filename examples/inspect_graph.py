"""See what the compiler does to one linear of a small random Llama, and what it did to all of them.

    python examples/inspect_graph.py

The same for your own model: ``QLORA_FX_DUMP=folder`` writes the graph after every stage,
``TORCH_LOGS="+qlora_fx"`` logs each stage's diff, ``qlora_fx.explain(qmodel)`` is the table below.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import qlora_fx
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

LINEAR = "model_layers_0_mlp_up_proj"


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QLORA_FX_DUMP"] = folder
        qmodel = qlora_fx.transform(
            LlamaForCausalLM(config),
            LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            compute_dtype=torch.float32,
        )
        for title, stage in (("as captured", "00_capture"), ("after the passes", "05_adapt")):
            dump = next(Path(folder).glob(f"train-*.{stage}.txt")).read_text()
            print(f"# {title}")
            for line in dump.splitlines():
                if line.strip().startswith(f"%{LINEAR}"):
                    print(line.strip().replace(LINEAR, "up_proj"))
            print()
    print(qlora_fx.explain(qmodel))


if __name__ == "__main__":
    main()
