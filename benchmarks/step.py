"""Step time and memory of qlora_fx beside PEFT + bitsandbytes and the pure-GEMM lower bound.

    python benchmarks/step.py [--rounds 5] [--rank 16] [--workloads text chat] [--json figures.json]

Two workloads: ``text``, one row of 512 tokens, all of which give loss; ``chat``, four rows of 256, of which the
last quarter does (the rest stands for prompts). Every stack lives in a process of its own. They take turns, one step each, round after round, so that a
drift of the machine's speed hits all alike; only one computes at any time. The bound is the time of the
step's matrix products alone (each linear's forward and input gradient, and LoRA's; of the head the rows that
give loss), in the dtype that multiplies fastest here; attention is not in it. qlora_fx loads the model in that dtype too, as the
references do in theirs. Memory is the peak of a step above the process before the model was loaded.
Quote ratios; absolute times hold for one machine and one hour. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT / "examples")  # not this folder, whose profile.py would hide Python's own

STACKS = {
    "qlora_fx": "qlora_fx, its defaults",
    "ref-fp32": "PEFT + bitsandbytes, float32",
    "ref-fp32-ckpt": "PEFT + bitsandbytes, float32, gradient checkpointing",
    "ref-bf16": "PEFT + bitsandbytes, bfloat16",
    "ref-bf16-ckpt": "PEFT + bitsandbytes, bfloat16, gradient checkpointing",
    "gemm": "matrix products alone (lower bound)",
}
WORKLOADS = {"text": (1, 512, 0), "chat": (4, 256, 192)}
"""Rows, tokens per row, and tokens at the start of each row that give no loss."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model", help="local folder (default: SmolLM2-135M-Instruct, see examples/obtain.py)"
    )
    p.add_argument(
        "--workloads", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME"
    )
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--stacks", nargs="*", default=list(STACKS), choices=list(STACKS))
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


# -- the driver: never imports torch --------------------------------------------------------------


class Worker:
    """A stack in its own process; answers each line on its stdin with one JSON line."""

    def __init__(
        self, stack: str, args: argparse.Namespace, script: str = __file__, *flags: str
    ) -> None:
        command = [sys.executable, script, "--worker", stack, "--model", args.model]
        command += ["--rank", str(args.rank), *flags]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        )
        self.times: dict[str, list[float]] = {name: [] for name in WORKLOADS}
        self.last: dict[str, dict[str, Any]] = {}
        self.ready: dict[str, Any] = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"worker ended: {self.process.args}")

    def ask(self, workload: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{workload}\n")
        self.process.stdin.flush()
        self.last[workload] = self.answer()
        return self.last[workload]


def drive(args: argparse.Namespace) -> None:
    workers: dict[str, Worker] = {}
    for (
        stack
    ) in args.stacks:  # one after the other: loading and compiling also wants the machine to itself
        print(f"starting {STACKS[stack]}", flush=True)
        workers[stack] = Worker(stack, args)
    tables = []
    figures = {}
    for workload in args.workloads:
        for worker in workers.values():
            worker.ask(workload)  # warm-up
            worker.ask(workload)
        for number in range(args.rounds):
            for worker in workers.values():
                time.sleep(0.5)  # let the other process's threads go to sleep
                worker.times[workload].append(worker.ask(workload)["seconds"])
            line = ", ".join(f"{s} {w.times[workload][-1]:.2f}" for s, w in workers.items())
            print(f"{workload}, round {number + 1}: {line}", flush=True)
        rows = [row(stack, w, workers, workload) for stack, w in workers.items()]
        figures[workload] = rows
        tables.append(table(rows, workload, args))
    for w in workers.values():
        assert w.process.stdin is not None
        w.process.stdin.close()
        w.process.wait()
    print("\n".join(tables))
    if args.json:
        found = {"machine": machine(), "args": vars(args), "workloads": figures}
        Path(args.json).write_text(json.dumps(found, indent=2))


def row(stack: str, w: Worker, workers: dict[str, Worker], workload: str) -> dict[str, Any]:
    times = {name: worker.times[workload] for name, worker in workers.items()}
    references = [name for name in times if name.startswith("ref-")]

    def ratio(other: str | None) -> float | None:
        if other not in times:
            return None
        return statistics.median(a / b for a, b in zip(times[stack], times[other], strict=True))

    fastest = min(references, key=lambda name: statistics.median(times[name]), default=None)
    median = statistics.median(times[stack])
    rows, tokens, _ = WORKLOADS[workload]
    last = w.last[workload]
    return {
        "stack": STACKS[stack],
        "median_s": median,
        "min_s": min(times[stack]),
        "max_s": max(times[stack]),
        "tokens_per_second": rows * tokens / median,
        "ratio_to_gemm": ratio("gemm"),
        "ratio_to_fastest_reference": ratio(fastest),
        "peak_above_idle": last["peak_rss"] - w.ready["idle_rss"] if "peak_rss" in last else None,
        "idle_rss": w.ready.get("idle_rss"),
        "first_step_s": w.ready.get("setup_s"),
        "grad_norm_min": last.get("grad_norm_min"),
        "adapters": last.get("adapters"),
        "loss": last.get("loss"),
    }


def machine() -> str:
    cpu = (
        next(
            (
                line.split(":", 1)[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")
            ),
            platform.processor(),
        )
        if os.path.exists("/proc/cpuinfo")
        else platform.processor()
    )
    return f"{cpu}, {os.cpu_count()} cores"


def number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def table(found: list[dict[str, Any]], workload: str, args: argparse.Namespace) -> str:
    rows, tokens, silent = WORKLOADS[workload]
    lines = [
        "",
        f"{workload}: {rows} x {tokens} tokens, {rows * (tokens - silent)} with loss, r={args.rank}, all linears; "
        f"median of {args.rounds} alternating rounds; {machine()}",
        "",
        "| stack | step s (min-max) | tokens/s | x GEMM bound | x fastest reference | peak GB above idle | setup + first step s | smallest adapter gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in found:
        gb = "-" if r["peak_above_idle"] is None else f"{r['peak_above_idle'] / 1e9:.2f}"
        norm = "-" if r["grad_norm_min"] is None else f"{r['grad_norm_min']:.1e} of {r['adapters']}"
        lines.append(
            f"| {r['stack']} | {r['median_s']:.2f} ({r['min_s']:.2f}-{r['max_s']:.2f}) | {r['tokens_per_second']:.0f} "
            f"| {number(r['ratio_to_gemm'], '.2f')} | {number(r['ratio_to_fastest_reference'], '.2f')} | {gb} "
            f"| {number(r['first_step_s'], '.0f')} | {norm} |"
        )
    return "\n".join(lines)


# -- the workers ----------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    import torch

    torch.manual_seed(0)
    import bitsandbytes  # noqa: F401 (all stacks begin with the same modules in memory)
    import peft  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    idle = rss()
    start = time.perf_counter()
    step = gemm(args) if args.worker == "gemm" else training_step(args)
    first = step("text")
    answer = {"setup_s": time.perf_counter() - start, "idle_rss": idle}
    print(json.dumps(answer if first else {"idle_rss": idle}), flush=True)
    current = ""
    for line in sys.stdin:
        if line != current:
            step(line.strip())  # its allocations and captures are not this workload's peak
            reset_peak()
        current = line
        start = time.perf_counter()
        result = step(line.strip())
        result["seconds"] = time.perf_counter() - start
        if result.pop("has_memory", True):
            result["peak_rss"] = peak()
        norms = result.pop("norms", dict)()
        print(json.dumps(result | norms), flush=True)


def batch(args: argparse.Namespace, workload: str) -> dict[str, Any]:
    """Real text, cut into rows."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = (ROOT / "tests" / "data" / "alice.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows, tokens, silent = WORKLOADS[workload]
    ids = ids.repeat(-(-rows * tokens // len(ids)))[: rows * tokens].view(rows, tokens)
    labels = ids.clone()
    labels[:, :silent] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def fastest_dtype() -> Any:
    from qlora_fx.runtime.fastest_dtype import fastest

    return fastest("cpu").dtype


def training_step(args: argparse.Namespace) -> Any:
    model, params = ours(args) if args.worker == "qlora_fx" else reference(args)
    if args.worker == "qlora_fx":
        optimizer: Any = model.paged_optimizer(lr=1e-4)
    else:
        import bitsandbytes as bnb

        optimizer = bnb.optim.PagedAdamW32bit(params.values(), lr=1e-4, weight_decay=0.0)
    inputs = {name: batch(args, name) for name in WORKLOADS}

    def step(workload: str) -> dict[str, Any]:
        optimizer.zero_grad()
        loss = model(**inputs[workload]).loss
        loss.backward()
        optimizer.step()

        def norms() -> dict[str, Any]:  # outside of the timed part
            found = [float(p.grad.norm()) for p in params.values() if p.grad is not None]
            return {"grad_norm_min": min(found), "adapters": len(found)}

        return {"loss": loss.item(), "norms": norms}

    return step


def ours(args: argparse.Namespace, **options: Any) -> Any:
    import qlora_fx
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=fastest_dtype())
    qmodel = qlora_fx.transform(
        model,
        LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear"),
        **options,
    )
    return qmodel, dict(qmodel.adapter_parameters())


def reference(args: argparse.Namespace) -> Any:
    """transformers + bitsandbytes + PEFT without needless casts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.bfloat16 if "bf16" in args.worker else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, quantization_config=quantization, device_map={"": "cpu"}
    )
    model.config.use_cache = False
    for p in model.parameters():
        p.requires_grad_(False)
    if args.worker.endswith("ckpt"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=TARGETS)
    )
    model.train()
    return model, {n: p for n, p in model.named_parameters() if p.requires_grad}


def gemm(args: argparse.Namespace) -> Any:
    """The matrix products of one step, and nothing else, on buffers made beforehand."""
    import torch
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(args.model)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    h, q, kv, m = (
        c.hidden_size,
        c.num_attention_heads * head,
        c.num_key_value_heads * head,
        c.intermediate_size,
    )
    layer = [(q, h), (kv, h), (kv, h), (h, q), (m, h), (m, h), (h, m)]
    linears = layer * c.num_hidden_layers + [(c.vocab_size, h)]
    dtype = fastest_dtype()
    made: dict[tuple[int, int, str], Any] = {}

    def buffer(a: int, b: int, role: str) -> Any:
        if (a, b, role) not in made:
            made[a, b, role] = torch.randn(a, b).to(dtype)
        return made[a, b, role]

    def step(workload: str) -> dict[str, Any]:
        r = args.rank
        count, tokens, silent = WORKLOADS[workload]
        for out, inn in linears:
            rows = count * (tokens - (silent if out == c.vocab_size else 0))
            w, x, y = buffer(out, inn, "w"), buffer(rows, inn, "x"), buffer(rows, out, "y")
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=buffer(rows, inn, "dx"))
            if out == c.vocab_size:
                continue  # the head has no adapter
            a, b, z = buffer(r, inn, "a"), buffer(out, r, "b"), buffer(rows, r, "z")
            torch.mm(x, a.t(), out=z)
            torch.mm(z, b.t(), out=y)
            torch.mm(y.t(), z, out=buffer(out, r, "db"))
            torch.mm(y, b, out=buffer(rows, r, "dz"))
            torch.mm(z.t(), x, out=buffer(r, inn, "da"))
            torch.mm(z, a, out=buffer(rows, inn, "dx"))
        return {"has_memory": False}

    def without_autograd(workload: str) -> dict[str, Any]:
        with torch.no_grad():
            return step(workload)

    return without_autograd


def rss() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))


def peak() -> int:
    """Peak resident bytes since the last reset."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Forget the peak of loading and compiling (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
