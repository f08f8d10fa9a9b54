"""From a checkpoint to four bits and back: load, train a little, save the base in 4 bits, merge the adapter.

    python examples/load_quantized.py                       # a small random Llama, written first
    python examples/load_quantized.py --model folder_or_id  # your own

The 16-bit model is never in memory: its tensors are read one after the other, quantized, and let go.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import qlora_fx
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    dtype="bfloat16",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder or a hub id (default: a small random Llama)")
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()) / "out")
    parser.add_argument("--backend", default="inductor", help="or eager, which compiles nothing")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model is None:
        args.model = args.out / "model"
        LlamaForCausalLM(CONFIG).bfloat16().save_pretrained(args.model)

    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    qmodel = qlora_fx.from_pretrained(args.model, lora, backend=args.backend)
    print(str(qlora_fx.explain(qmodel)).splitlines()[-1])

    optimizer = qmodel.paged_optimizer(lr=1e-2)
    ids = torch.randint(qmodel.config.vocab_size, (2, 16))
    for _ in range(5):
        loss = qmodel(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss after 5 steps: {loss.item():.3f}")

    qmodel.save_pretrained(args.out / "adapter")  # PEFT's files
    qmodel.save_quantized(args.out / "4bit")  # transformers + bitsandbytes load this
    print(qmodel.merge(args.out / "merged", "dequantized"))  # and anything loads this
    merged = AutoModelForCausalLM.from_pretrained(args.out / "merged")
    print(f"loss of the merged model: {merged(input_ids=ids, labels=ids).loss.item():.3f}")
    print(f"wrote {', '.join(sorted(p.name for p in args.out.iterdir()))} to {args.out}")


if __name__ == "__main__":
    main()
