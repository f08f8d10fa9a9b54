"""What ``qlora_fx.plan`` predicts, beside what a training step really allocates.

    python benchmarks/memory.py [--cases smollm-text ...]

Each case trains in a process of its own, from the same config that was planned. Measured is what PyTorch's allocator
handed out at most during the third step, with what is held all the time: the count that
``torch.cuda.max_memory_allocated`` gives on a GPU. Beside it the resident memory of the process above the same process
before a model was loaded: it has compiled code, captured graphs and what the allocator keeps, which no plan counts.
For a budget also the step's time beside that of keeping everything, and what the plan says of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This folder comes last: its profile.py would hide Python's own.
sys.path = [str(ROOT / "examples"), *sys.path[1:], str(ROOT / "benchmarks")]

CASES: dict[str, dict[str, Any]] = {
    "smollm-text": {"batch_size": 1, "sequence_length": 512},
    "smollm-8bit": {"batch_size": 4, "sequence_length": 256, "optimizer": "PagedAdamW8bit"},
    "smollm-r64": {"batch_size": 2, "sequence_length": 512, "r": 64, "memory_budget": 0.0},
    "smollm-lion": {
        "batch_size": 8,
        "sequence_length": 128,
        "r": 8,
        "optimizer": "PagedLion32bit",
        "memory_budget": 0.5,
    },
    "llama300m": {"batch_size": 1, "sequence_length": 1024},
    "llama300m-half": {"batch_size": 4, "sequence_length": 512, "memory_budget": 0.5},
    "qwen3-wide": {"batch_size": 2, "sequence_length": 768, "optimizer": "PagedAdamW8bit"},
}


def model_of(case: str) -> Any:
    """The config that is planned and trained."""
    from obtain import model_folder
    from transformers import AutoConfig, LlamaConfig, Qwen3Config

    if case.startswith("smollm"):
        return AutoConfig.from_pretrained(model_folder())
    if case.startswith("llama"):
        return LlamaConfig(
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=20,
            num_attention_heads=16,
            num_key_value_heads=16,
            vocab_size=32000,
        )
    return Qwen3Config(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=128,
        vocab_size=50000,
        tie_word_embeddings=False,
    )


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    p.add_argument("--worker", choices=list(CASES), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        work(args.worker)
        return
    import step as benchmark

    rows = []
    for case in args.cases:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(case, rows[-1], flush=True)
    print(
        f"{benchmark.machine()}\n\n| case | tokens | r | optimizer | budget | planned MB | allocated MB | off by "
        "| resident MB | place of the peak | slower than keeping all | planned |\n"
        + "|---" * 12
        + "|"
    )
    for case, row in zip(args.cases, rows, strict=True):
        s = row["settings"]
        budget = "all" if s["memory_budget"] == 1.0 else s["memory_budget"]
        slower = (
            f"{row['slower']:.2f} | {1 + row['recomputation']:.2f}" if budget != "all" else "- | -"
        )
        print(
            f"| {case} | {s['batch_size']} x {s['sequence_length']} | {s['r']} | {s['optimizer']} | {budget} "
            f"| {row['planned'] / 1e6:.1f} | {row['allocated'] / 1e6:.1f} "
            f"| {row['planned'] / row['allocated'] - 1:+.1%} | {row['resident'] / 1e6:.0f} | {row['place']} | {slower} |"
        )


def work(case: str) -> None:
    import qlora_fx
    import step as benchmark
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    settings = dict(CASES[case])
    rank = settings.pop("r", 16)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")
    config = model_of(case)
    plan = qlora_fx.plan(config, lora, device="cpu", **settings)
    idle = benchmark.rss()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    budget = settings.get("memory_budget")
    keep_all = 1.0  # not None: that would look at free memory
    qmodel = qlora_fx.transform(
        model,
        lora,
        compute_dtype="bfloat16",
        memory_budget=keep_all if budget is None else budget,
    )
    name = settings.get("optimizer", "PagedAdamW32bit")
    optimizer = qmodel.paged_optimizer(lr=1e-4, optimizer=name)
    shape = (settings["batch_size"], settings["sequence_length"])
    ids = torch.randint(0, config.vocab_size, shape)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        optimizer.zero_grad()
        qmodel(**inputs).loss.backward()
        optimizer.step()

    def seconds() -> float:
        found = []
        for _ in range(5):
            start = time.perf_counter()
            step()
            found.append(time.perf_counter() - start)
        return sorted(found)[2]

    step()
    step()
    benchmark.reset_peak()
    allocated = held(qmodel, optimizer) + most_allocated(step)
    resident = benchmark.peak() - idle
    slower = 1.0
    if budget is not None:
        bare = seconds()
        qmodel.memory_budget = keep_all
        step()
        step()
        slower = bare / seconds()
    assert all(float(p.grad.norm()) > 0 for n, p in qmodel.adapter_parameters() if "lora_B" in n)
    print(
        json.dumps(
            {
                "settings": plan.settings,
                "planned": plan.peak,
                "place": plan.highest.place,
                "allocated": allocated,
                "resident": resident,
                "recomputation": plan.recomputation,
                "slower": slower,
            }
        )
    )


def held(qmodel: Any, optimizer: Any) -> int:
    """Bytes of all tensors that live between steps, each memory counted once."""
    import torch

    tensors = [t for _, t in qmodel.base.store.items()]
    tensors += [p.grad for _, p in qmodel.adapter_parameters() if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [t for t in state.values() if isinstance(t, torch.Tensor)]
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(memory.values())


def most_allocated(step: Any) -> int:
    """The most that PyTorch's allocator handed out at once during a step, above what was there before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


if __name__ == "__main__":
    main()
