"""Step time and memory of qlora_fx beside PEFT + bitsandbytes and the pure-GEMM lower bound.

    python benchmarks/step.py [--tokens 512] [--rows 1] [--rank 16] [--rounds 5]

Every stack lives in a process of its own. They take turns, one step each, round after round, so that a
drift of the machine's speed hits all alike; only one computes at any time. The bound is the time of the
step's matrix products alone (each linear's forward and input gradient, and LoRA's), in the fastest dtype.
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
sys.path.insert(0, str(ROOT / "examples"))

STACKS = {
    "qlora_fx": "qlora_fx, its defaults",
    "ref-fp32": "PEFT + bitsandbytes, float32",
    "ref-fp32-ckpt": "PEFT + bitsandbytes, float32, gradient checkpointing",
    "ref-bf16": "PEFT + bitsandbytes, bfloat16",
    "ref-bf16-ckpt": "PEFT + bitsandbytes, bfloat16, gradient checkpointing",
    "gemm": "matrix products alone (lower bound)",
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model", help="local folder (default: SmolLM2-135M-Instruct, see examples/obtain.py)"
    )
    p.add_argument("--tokens", type=int, default=512, help="tokens per row")
    p.add_argument("--rows", type=int, default=1)
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

    def __init__(self, stack: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", stack, "--model", args.model]
        command += [
            "--tokens",
            str(args.tokens),
            "--rows",
            str(args.rows),
            "--rank",
            str(args.rank),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"},
        )
        self.times: list[float] = []
        self.ready: dict[str, Any] = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)  # type: ignore[no-any-return]
        raise SystemExit(f"worker ended: {self.process.args}")

    def ask(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.last = self.answer()
        return self.last


def drive(args: argparse.Namespace) -> None:
    workers: dict[str, Worker] = {}
    for (
        stack
    ) in args.stacks:  # one after the other: loading and compiling also wants the machine to itself
        print(f"starting {STACKS[stack]}", flush=True)
        workers[stack] = Worker(stack, args)
        workers[stack].ask()  # warm-up
    for number in range(args.rounds):
        for worker in workers.values():
            time.sleep(0.5)  # let the other process's threads go to sleep
            worker.times.append(worker.ask()["seconds"])
        print(
            f"round {number + 1}: "
            + ", ".join(f"{s} {w.times[-1]:.2f}" for s, w in workers.items()),
            flush=True,
        )
    rows = [row(stack, w, workers, args) for stack, w in workers.items()]
    for w in workers.values():
        assert w.process.stdin is not None
        w.process.stdin.close()
        w.process.wait()
    print(table(rows, args))
    if args.json:
        Path(args.json).write_text(
            json.dumps({"machine": machine(), "args": vars(args), "rows": rows}, indent=2)
        )


def row(
    stack: str, w: Worker, workers: dict[str, Worker], args: argparse.Namespace
) -> dict[str, Any]:
    def ratio(other: str) -> float | None:
        if other not in workers:
            return None
        return statistics.median(a / b for a, b in zip(w.times, workers[other].times, strict=True))

    median = statistics.median(w.times)
    return {
        "stack": STACKS[stack],
        "median_s": median,
        "min_s": min(w.times),
        "max_s": max(w.times),
        "tokens_per_second": args.tokens * args.rows / median,
        "ratio_to_gemm": ratio("gemm"),
        "ratio_to_fastest_reference": ratio("ref-fp32"),
        "peak_rss": w.last.get("peak_rss"),
        "idle_rss": w.ready.get("idle_rss"),
        "first_step_s": w.ready.get("setup_s"),
        "grad_norm_min": w.last.get("grad_norm_min"),
        "adapters": w.last.get("adapters"),
        "loss": w.last.get("loss"),
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


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    lines = [
        "",
        f"{args.rows} x {args.tokens} tokens, r={args.rank}, all linears; median of {args.rounds} alternating rounds; {machine()}",
        "",
        "| stack | step s (min-max) | tokens/s | x GEMM bound | x fastest reference | peak GB (idle) | setup + first step s | smallest adapter gradient |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        number = lambda v, f: "-" if v is None else format(v, f)  # noqa: E731
        gb = (
            "-"
            if r["peak_rss"] is None
            else f"{r['peak_rss'] / 1e9:.2f} ({r['idle_rss'] / 1e9:.2f})"
        )
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
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    idle = rss()
    start = time.perf_counter()
    step = gemm(args) if args.worker == "gemm" else training_step(args)
    first = step()
    answer = {"setup_s": time.perf_counter() - start, "idle_rss": idle}
    print(json.dumps(answer if first else {"idle_rss": idle}), flush=True)
    reset_peak()
    for _ in sys.stdin:
        start = time.perf_counter()
        result = step()
        result["seconds"] = time.perf_counter() - start
        if result.pop("has_memory", True):
            result["peak_rss"] = peak()
        norms = result.pop("norms", dict)()
        print(json.dumps(result | norms), flush=True)


def batch(args: argparse.Namespace) -> dict[str, Any]:
    """Real text, cut into rows."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = (ROOT / "tests" / "data" / "alice.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    need = args.rows * args.tokens
    ids = ids.repeat(-(-need // len(ids)))[:need].view(args.rows, args.tokens)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def training_step(args: argparse.Namespace) -> Any:
    model, params = ours(args) if args.worker == "qlora_fx" else reference(args)
    if args.worker == "qlora_fx":
        optimizer: Any = model.paged_optimizer(lr=1e-4)
    else:
        import bitsandbytes as bnb

        optimizer = bnb.optim.PagedAdamW32bit(params.values(), lr=1e-4, weight_decay=0.0)
    inputs = batch(args)

    def step() -> dict[str, Any]:
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()

        def norms() -> dict[str, Any]:  # outside of the timed part
            found = [float(p.grad.norm()) for p in params.values() if p.grad is not None]
            return {"grad_norm_min": min(found), "adapters": len(found)}

        return {"loss": loss.item(), "norms": norms}

    return step


def ours(args: argparse.Namespace) -> Any:
    import qlora_fx
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    qmodel = qlora_fx.transform(
        model, LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules="all-linear")
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
    rows = args.tokens * args.rows
    made: dict[tuple[int, int, str], Any] = {}

    def buffer(a: int, b: int, role: str) -> Any:
        if (a, b, role) not in made:
            made[a, b, role] = torch.randn(a, b)
        return made[a, b, role]

    def step() -> dict[str, Any]:
        r = args.rank
        for out, inn in linears:
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

    with torch.no_grad():
        step()
    return step


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
