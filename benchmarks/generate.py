"""Generation beside PEFT + bitsandbytes: tokens per second, prefill, and the time that reading the bytes takes.

    python benchmarks/generate.py [--rounds 3] [--batches 1 8] [--prompt 512] [--new 64] [--adapters 4]
        [--also-quantize head embeddings] [--json figures.json]

Each stack lives in a process of its own; they take turns, round after round, and only one computes at any time. Prefill
is the time of ``generate`` for one new token; decode is what each further one takes. The bound is the time to read once
what one step of decode must read, at the speed at which this machine reads a large tensor: packed weights and their
scales, the adapter, the head, and the cache of all rows. Greedy, SmolLM2-135M, random prompts, ``lora_B`` not zero.
With ``--adapters``, rows take turns among as many adapters (``adapter_names``); with ``--also-quantize head embeddings`` qlora_fx has
them in 4 bits, which the reference keeps dense. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT / "examples"), *sys.path[1:], str(ROOT / "benchmarks")]

STACKS = {"qlora_fx": "qlora_fx, its defaults", "reference": "PEFT + bitsandbytes"}


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
    p.add_argument("--adapters", type=int, default=0, help="rows choose among so many")
    p.add_argument("--also-quantize", nargs="*", default=[], help="head, embeddings")
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


def drive(args: argparse.Namespace) -> None:
    from step import Worker, machine

    workers = {}
    for stack, name in STACKS.items():
        print(f"starting {name}", flush=True)
        flags = (
            "--prompt",
            str(args.prompt),
            "--new",
            str(args.new),
            "--adapters",
            str(args.adapters),
            "--also-quantize",
            *args.also_quantize,
        )
        workers[stack] = Worker(stack, args, __file__, *flags)
    figures: dict[str, Any] = {}
    for batch in args.batches:
        first = {stack: worker.ask(str(batch)) for stack, worker in workers.items()}
        found: dict[str, list[dict[str, Any]]] = {stack: [] for stack in workers}
        for number in range(args.rounds):
            for stack, worker in workers.items():
                time.sleep(0.5)  # let the other process's threads go to sleep
                found[stack].append(worker.ask(str(batch)))
            line = ", ".join(f"{s} {f[-1]['decode']:.1f}" for s, f in found.items())
            print(f"batch {batch}, round {number + 1}: {line} tokens/s", flush=True)
        bound = workers["qlora_fx"].ready["bytes"] + batch * workers["qlora_fx"].ready["cache"]
        limit = batch * workers["qlora_fx"].ready["bandwidth"] / bound
        figures[str(batch)] = {"first": first, "rounds": found, "bound": limit}
        print(f"{machine()}, {workers['qlora_fx'].ready['dtype']}")
        print(table(batch, found, first, limit), flush=True)
    for worker in workers.values():
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        worker.process.wait()
    if args.json:
        Path(args.json).write_text(
            json.dumps({"machine": machine(), "args": vars(args), **figures}, indent=2)
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
    import step
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    if args.worker == "qlora_fx":
        model, _ = step.ours(args, also_quantize=args.also_quantize)
    else:
        args.worker = str(step.fastest_dtype()).replace("bfloat16", "bf16")
        model, _ = step.reference(args)
        model.config.use_cache = True
    for number in range(args.adapters):
        model.add_adapter(f"adapter_{number}", copy.deepcopy(model.peft_config["default"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.eval()
    print(json.dumps(sizes(model, args) if args.worker == "qlora_fx" else {}), flush=True)
    for line in sys.stdin:
        ids = torch.randint(5, 40000, (int(line), args.prompt))
        before = time.perf_counter()
        names = [f"adapter_{row % args.adapters}" for row in range(len(ids)) if args.adapters]
        settings = {"adapter_names": names} if names else {}
        generate(model, ids, 2, settings)
        call = time.perf_counter() - before
        start = time.perf_counter()
        generate(model, ids, 1, settings)
        middle = time.perf_counter()
        generate(model, ids, args.new + 1, settings)
        prefill, whole = middle - start, time.perf_counter() - middle
        decode = args.new * len(ids) / (whole - prefill)
        print(json.dumps({"call": call, "prefill": prefill, "decode": decode}), flush=True)


def generate(model: Any, ids: Any, new: int, settings: dict[str, Any]) -> None:
    import torch

    settings = settings | {
        "use_cache": True,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    mask = torch.ones_like(ids)
    model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **settings
    )


def sizes(model: Any, args: argparse.Namespace) -> dict[str, Any]:
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
    cache = float(model.dtype.itemsize) * heads * (args.prompt + args.new / 2)
    speed = large.nbytes / min(times)
    return {"bytes": held, "cache": cache, "bandwidth": speed, "dtype": str(model.compute_dtype)}


if __name__ == "__main__":
    main()
