"""Generation beside PEFT + bitsandbytes: tokens per second, prefill, and the time that reading the bytes takes.

    python benchmarks/generate.py [--rounds 3] [--batches 1 8] [--prompt 512] [--new 64] [--json figures.json]

Each stack lives in a process of its own; they take turns, round after round, and only one computes at any time. Prefill
is the time of ``generate`` for one new token; decode is what each further one takes. The bound is the time to read once
what one step of decode must read, at the speed at which this machine reads a large tensor: packed weights and their
scales, the adapter, the head, and the cache of all rows. Greedy, SmolLM2-135M, random prompts, ``lora_B`` not zero.
Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "examples")  # not this folder, whose profile.py would hide Python's own

STACKS = {"qlora_fx": "qlora_fx", "reference": "PEFT + bitsandbytes, float32"}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="local folder (default: SmolLM2-135M-Instruct)")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--json", help="also write the figures to this file")
    p.add_argument("--worker", choices=list(STACKS), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.model is None:
        from obtain import model_folder

        args.model = str(model_folder())
    if args.worker:
        work(args)
    else:
        drive(args)


class Worker:
    """A stack in its own process; answers each line on its stdin with one JSON line."""

    def __init__(self, stack: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", stack, "--model", args.model]
        for name in ("rank", "prompt", "new"):
            command += [f"--{name}", str(getattr(args, name))]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        )
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"worker ended: {self.process.args}")

    def ask(self, batch: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return self.answer()


def drive(args: argparse.Namespace) -> None:
    workers = {}
    for stack, name in STACKS.items():
        print(f"starting {name}", flush=True)
        workers[stack] = Worker(stack, args)
    figures: dict[str, Any] = {}
    for batch in args.batches:
        first = {stack: worker.ask(batch) for stack, worker in workers.items()}
        found: dict[str, list[dict[str, Any]]] = {stack: [] for stack in workers}
        for number in range(args.rounds):
            for stack, worker in workers.items():
                time.sleep(0.5)  # let the other process's threads go to sleep
                found[stack].append(worker.ask(batch))
            line = ", ".join(f"{s} {f[-1]['decode']:.1f}" for s, f in found.items())
            print(f"batch {batch}, round {number + 1}: {line} tokens/s", flush=True)
        bound = workers["qlora_fx"].ready["bytes"] + batch * workers["qlora_fx"].ready["cache"]
        limit = batch * workers["qlora_fx"].ready["bandwidth"] / bound
        figures[str(batch)] = {"first": first, "rounds": found, "bound": limit}
        print(table(batch, found, first, limit), flush=True)
    for worker in workers.values():
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.process.wait()
    if args.json:
        Path(args.json).write_text(
            json.dumps({"machine": platform.platform(), "args": vars(args), **figures}, indent=2)
        )


def table(batch: int, found: Any, first: Any, limit: float) -> str:
    lines = [
        f"batch {batch}",
        f"{'':32}{'decode tokens/s':>18}{'of the bound':>14}{'prefill s':>11}{'first call s':>14}",
    ]
    for stack, rounds in found.items():
        decode, prefill = (statistics.median(r[k] for r in rounds) for k in ("decode", "prefill"))
        lines.append(
            f"{STACKS[stack]:32}{decode:18.1f}{decode / limit:14.2f}{prefill:11.2f}{first[stack]['call']:14.1f}"
        )
    lines.append(f"{'reading the bytes':32}{limit:18.1f}{1:14.2f}")
    return "\n".join(lines)


# -- a worker -------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    model = ours(args) if args.worker == "qlora_fx" else reference(args)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.eval()
    print(json.dumps(sizes(model, args) if args.worker == "qlora_fx" else {}), flush=True)
    for line in sys.stdin:
        ids = torch.randint(5, 40000, (int(line), args.prompt))
        before = time.perf_counter()
        generate(model, ids, 2)
        call = time.perf_counter() - before
        start = time.perf_counter()
        generate(model, ids, 1)
        middle = time.perf_counter()
        generate(model, ids, args.new + 1)
        prefill, whole = middle - start, time.perf_counter() - middle
        decode = args.new * len(ids) / (whole - prefill)
        print(json.dumps({"call": call, "prefill": prefill, "decode": decode}), flush=True)


def generate(model: Any, ids: Any, new: int) -> None:
    import torch

    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **settings
    )


def ours(args: argparse.Namespace) -> Any:
    import qlora_fx
    from peft import LoraConfig

    lora = LoraConfig(r=args.rank, target_modules="all-linear")
    return qlora_fx.from_pretrained(args.model, lora, progress=False, compute_dtype="float32")


def reference(args: argparse.Namespace) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(
        args.model, quantization_config=four_bits, dtype=torch.float32
    )
    return get_peft_model(base, LoraConfig(r=args.rank, target_modules="all-linear"))


def sizes(model: Any, args: argparse.Namespace) -> dict[str, float]:
    """Bytes that each step reads whatever the batch; of a row's cache; and bytes per second of reading."""
    import torch

    config = model.config
    store = dict(model.base.store.items())
    held = sum(t.nbytes for t in store.values() if isinstance(t, torch.Tensor))
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    large = torch.zeros(1 << 26)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        large.sum()
        times.append(time.perf_counter() - start)
    cache = 4.0 * heads * (args.prompt + args.new / 2)
    return {"bytes": held, "cache": cache, "bandwidth": large.nbytes / min(times)}


if __name__ == "__main__":
    main()
