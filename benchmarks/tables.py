"""The memory tables of QLoRA's field, from the graphs of Llama's sizes: full fine-tuning, LoRA and QLoRA.

    python benchmarks/tables.py [--batch-size 1] [--sequence-length 512] [--models 7B 65B ...]

No weight exists and nothing is trained: each config is traced and planned (``qlora_fx.plan``). Counted are tensors;
libraries, kernels' own workspace and fragmentation on a GPU are not (allow for 1 to 2 GB).
"""

from __future__ import annotations

import argparse
import sys
import time

sys.path = sys.path[1:]  # this folder's profile.py would hide Python's own

import qlora_fx
from transformers import LlamaConfig

GB = 10**9
CARDS = (8, 16, 24, 48, 80)
MODELS = {
    # hidden, intermediate, layers, heads, key heads (LLaMA, arXiv:2302.13971, table 2; Llama 2, arXiv:2307.09288)
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "33B": (6656, 17920, 60, 52, 52),
    "65B": (8192, 22016, 80, 64, 64),
    "70B": (8192, 28672, 80, 64, 8),
}


def config(name: str) -> LlamaConfig:
    hidden, intermediate, layers, heads, key_heads = MODELS[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=32000,
        max_position_embeddings=4096,
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batch-size", type=int, default=1)
    p.add_argument("--sequence-length", type=int, default=512)
    p.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    args = p.parse_args()
    shape = {"batch_size": args.batch_size, "sequence_length": args.sequence_length}
    plans, least = {}, {}
    print(
        "| model | parameters | adapters r=16 | storage | constants | adapters, gradients, AdamW | activations | workspace "
        "| QLoRA | blocks recomputed | LoRA, 16 bits | full, 16 bits | s to plan |\n"
        + "|---" * 13
        + "|"
    )
    for name in args.models:
        start = time.perf_counter()
        plan = plans[name] = qlora_fx.plan(config(name), **shape)
        seconds = time.perf_counter() - start
        small = least[name] = qlora_fx.plan(config(name), memory_budget=0.0, **shape)
        other = plan.methods()
        trained = plan.adapters + plan.gradients + plan.optimizer
        sizes = [plan.storage, plan.constants, trained, plan.activations, plan.workspace]
        cells = [f"{size / GB:.2f}" for size in (*sizes, plan.peak, small.peak)]
        cells += [f"{other[method] / GB:.0f}" for method in ("lora", "full")]
        held = plan.footprint
        print(
            f"| {name} | {held.parameters / 1e9:.1f}B | {held.trained / 1e6:.1f}M | "
            + " | ".join(cells)
            + f" | {seconds:.0f} |",
            flush=True,
        )
    print(
        f"\nGB of 10^9 bytes, {args.batch_size} x {args.sequence_length} tokens, bfloat16, NF4 with double quantization."
    )
    print(
        "\n| card | largest model, everything kept | largest model, blocks recomputed |\n|---|---|---|"
    )
    for card in CARDS:
        cells = []
        for found in (plans, least):
            fits = [name for name, plan in found.items() if plan.fits(card * GB)]
            most = max(fits, key=lambda name: plans[name].footprint.parameters, default=None)
            cells.append("none" if most is None else f"{most} ({found[most].peak / GB:.1f} GB)")
        print(f"| {card} GB | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
