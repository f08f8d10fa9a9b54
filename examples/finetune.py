"""Fine-tune a model with QLoRA, on two CPU cores or on a GPU, and take the adapter home to PEFT.

    python examples/finetune.py                          # SmolLM2-135M learns to write dates in words
    python examples/finetune.py --data mine.jsonl        # your prompt/completion pairs or chat messages
    python examples/finetune.py --model meta-llama/Llama-3.2-1B --data mine.jsonl
    python examples/finetune.py --resume                 # go on where an interrupted run stopped

Writes to --out: adapter/ (PEFT's format), loss.png, log.jsonl, summary.json, checkpoint/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import qlora_fx
import torch
from data import IGNORE, Example, Formatter, batches, dates, read_jsonl
from obtain import model_folder
from tqdm import tqdm

SHOWN = 3


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--model", help="hub id or local folder (default: SmolLM2-135M-Instruct from a wheel)"
    )
    p.add_argument(
        "--data", help="JSONL with prompt/completion or messages (default: dates in words)"
    )
    p.add_argument("--out", default="out/demo", help="folder for results (default: %(default)s)")
    p.add_argument("--steps", type=int, default=60, help="optimizer steps (default: %(default)s)")
    p.add_argument(
        "--batch-size", type=int, default=4, help="examples per step (default: %(default)s)"
    )
    p.add_argument("--lr", type=float, default=5e-4, help="learning rate (default: %(default)s)")
    p.add_argument("--rank", type=int, default=8, help="LoRA rank (default: %(default)s)")
    p.add_argument(
        "--max-length", type=int, default=512, help="tokens per example (default: %(default)s)"
    )
    p.add_argument(
        "--held-out", type=int, default=16, help="examples kept for the test (default: %(default)s)"
    )
    p.add_argument(
        "--max-new-tokens", type=int, default=16, help="per answer (default: %(default)s)"
    )
    p.add_argument(
        "--save-every",
        type=int,
        default=10,
        help="steps between checkpoints (default: %(default)s)",
    )
    p.add_argument(
        "--backend",
        choices=("inductor", "aot_eager", "eager"),
        default="inductor",
        help="what runs the graph; the others start sooner and step slower (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    args = p.parse_args()
    for name in (
        "steps",
        "batch_size",
        "rank",
        "max_length",
        "held_out",
        "max_new_tokens",
        "save_every",
    ):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}; accepted: at least 1")
    return args


def main() -> None:
    args = arguments()
    # A warning is a line for the reader here, not a place in the source.
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    out = Path(args.out)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    run = Run(args, out)
    try:
        run.train()
        if run.step == args.steps:
            run.finish()
    except KeyboardInterrupt:
        run.stopped = True
    if run.stopped:
        print(
            f"\ninterrupted after step {run.step}; "
            + (
                f"go on with --resume from {out / 'checkpoint'}"
                if run.has_checkpoint()
                else "no checkpoint yet"
            )
        )
        sys.exit(130)
    print(f"done in {time.perf_counter() - started:.0f} s: {out / 'summary.json'}")


class Run:
    """One training run: its model, its data, how far it is."""

    def __init__(self, args: argparse.Namespace, out: Path) -> None:
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.args, self.out, self.step, self.stopped = args, out, 0, False
        self.log: list[dict[str, Any]] = []
        self.before: float | None = None
        self.source = args.model or str(model_folder())
        self.formatter = Formatter(AutoTokenizer.from_pretrained(self.source), args.max_length)
        self.training, self.held_out = split(args)

        lora = LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = AutoModelForCausalLM.from_pretrained(self.source, dtype="auto")
        if torch.cuda.is_available():
            model = model.to("cuda")
        print(f"transforming {Path(self.source).name}", flush=True)
        self.qmodel = qlora_fx.transform(model, lora, backend=args.backend)
        del model
        print(qlora_fx.explain(self.qmodel), flush=True)
        self.optimizer = self.qmodel.paged_optimizer(lr=args.lr)
        out.mkdir(parents=True, exist_ok=True)
        if args.resume:
            self.load_checkpoint()

    # -- training ---------------------------------------------------------------------------------

    def train(self) -> None:
        if self.before is None:
            self.before = self.exact_match("before")
        args, q = self.args, self.qmodel
        order = islice(
            batches(len(self.training), args.batch_size, args.seed), self.step, args.steps
        )
        q.train()
        signal.signal(signal.SIGINT, self.stop_after_this_step)
        bar = tqdm(
            order,
            total=args.steps,
            initial=self.step,
            desc="training",
            unit="step",
            file=sys.stdout,
        )
        for indices in bar:
            start = time.perf_counter()
            batch = self.formatter.batch([self.training[i] for i in indices])
            batch = {k: v.to(q.device) for k, v in batch.items()}
            loss = q(**batch).loss
            loss.backward()
            norms = [float(p.grad.norm()) for _, p in q.adapter_parameters() if p.grad is not None]
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            seconds = time.perf_counter() - start
            tokens = int(batch["attention_mask"].sum())
            self.log.append(
                {
                    "step": self.step,
                    "loss": loss.item(),
                    "tokens": tokens,
                    "seconds": seconds,
                    "learned_tokens": int((batch["labels"] != IGNORE).sum()),
                    "adapter_grad_norm_min": min(norms),
                    "adapters_with_grad": len(norms),
                }
            )
            bar.set_postfix_str(
                f"loss {loss.item():.3f}, {tokens / seconds:.0f} tokens/s"
                + (" (compiling)" if len(self.log) == 1 else "")
            )
            if self.stopped or self.step % args.save_every == 0:
                self.save_checkpoint()
            if self.stopped:
                break
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop_after_this_step(self, *_: Any) -> None:
        """First Ctrl-C: a step is never saved half done. A second one stops at once."""
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nstopping after this step (Ctrl-C again: at once)", flush=True)

    def has_checkpoint(self) -> bool:
        return (self.out / "checkpoint" / "state.json").exists()

    def exact_match(self, when: str) -> float:
        """Share of held-out questions answered to the letter; prints a few."""
        right = 0
        answers: list[str] = []
        for start in range(0, len(self.held_out), 16):
            part = self.held_out[start : start + 16]
            prompts = {k: v.to(self.qmodel.device) for k, v in self.formatter.prompts(part).items()}
            ids = self.qmodel.generate(
                **prompts,
                do_sample=False,
                max_new_tokens=self.args.max_new_tokens,
                pad_token_id=self.formatter.pad,
            )
            new = ids[:, prompts["input_ids"].shape[1] :]
            answers += self.formatter.tokenizer.batch_decode(new, skip_special_tokens=True)
        right = sum(
            a.strip() == e.answer.strip() for a, e in zip(answers, self.held_out, strict=True)
        )
        print(f"\nanswers {when} training ({right} of {len(answers)} exact):")
        for example, answer in list(zip(self.held_out, answers, strict=True))[:SHOWN]:
            print(f"  {example.question!r} -> {answer.strip()!r}")
        print(flush=True)
        return right / len(answers)

    # -- checkpoints ------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        """Adapter, optimizer and progress, as a whole folder or not at all."""
        final, scratch, old = (
            self.out / n for n in ("checkpoint", ".checkpoint.new", ".checkpoint.old")
        )
        shutil.rmtree(scratch, ignore_errors=True)
        self.qmodel.save_pretrained(scratch)
        torch.save(self.optimizer.state_dict(), scratch / "optimizer.pt")
        state = {
            "step": self.step,
            "before": self.before,
            "log": self.log,
            "settings": self.settings(),
        }
        (scratch / "state.json").write_text(json.dumps(state))
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            os.replace(final, old)
        os.replace(scratch, final)
        shutil.rmtree(old, ignore_errors=True)

    def load_checkpoint(self) -> None:
        folder = self.out / "checkpoint"
        if not folder.exists() and (self.out / ".checkpoint.old").exists():
            folder = self.out / ".checkpoint.old"  # stopped between two renames
        if not (folder / "state.json").exists():
            raise qlora_fx.DataError(
                f"--resume: no checkpoint in {self.out}; start without --resume"
            )
        state = json.loads((folder / "state.json").read_text())
        if state["settings"] != self.settings():
            changed = {
                k: (v, self.settings()[k])
                for k, v in state["settings"].items()
                if v != self.settings()[k]
            }
            raise qlora_fx.DataError(
                f"--resume: the checkpoint was made with other settings (then, now): {changed}"
            )
        self.qmodel.load_adapter(folder)
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
        self.step, self.before, self.log = state["step"], state["before"], state["log"]
        print(f"resuming after step {self.step}")

    def settings(self) -> dict[str, Any]:
        names = ("model", "data", "batch_size", "lr", "rank", "max_length", "held_out", "seed")
        return {n: getattr(self.args, n) for n in names}

    # -- results ----------------------------------------------------------------------------------

    def finish(self) -> None:
        after = self.exact_match("after")
        self.save_checkpoint()
        adapter = self.out / "adapter"
        self.qmodel.save_pretrained(adapter)
        (self.out / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in self.log))
        plot(self.log, self.out / "loss.png")
        timed = self.log[1:] or self.log  # the first step compiles
        summary = {
            "model": Path(self.source).name if Path(self.source).is_dir() else self.source,
            "steps": self.step,
            "exact_match_before": self.before,
            "exact_match_after": after,
            "loss_first": self.log[0]["loss"],
            "loss_last": self.log[-1]["loss"],
            "tokens_per_second": sum(r["tokens"] for r in timed) / sum(r["seconds"] for r in timed),
            "peak_rss_bytes": peak_rss(),
            "peft_reload_max_abs_logit_diff": self.compare_with_peft(adapter),
            "adapter_grad_norm_min": self.log[-1]["adapter_grad_norm_min"],
        }
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(json.dumps(summary, indent=2))
        print(f"\nexact match on held-out examples: {self.before:.0%} before, {after:.0%} after")
        print(f"use it:  PeftModel.from_pretrained(model, {str(adapter)!r})")

    def compare_with_peft(self, adapter: Path) -> float:
        """Largest difference of logits to the same adapter in plain PEFT + transformers + bitsandbytes.

        Theirs multiplies in float32. Where ours does not, it may be as far from that as theirs in our dtype is.
        """
        batch = self.formatter.batch(self.held_out[:4])
        batch = {k: v.to(self.qmodel.device) for k, v in batch.items()}
        real = batch["attention_mask"].bool()
        self.qmodel.train()
        with torch.no_grad():
            ours = self.qmodel(**batch, return_logits=True).logits[real]
        theirs = self.peft_logits(adapter, batch, torch.float32)[real]
        difference, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
        limit, note = 1e-2 * scale, ""
        if self.qmodel.compute_dtype != torch.float32:
            low = self.peft_logits(adapter, batch, self.qmodel.compute_dtype)[real]
            rounding = float((low - theirs).abs().max())
            limit = max(limit, 2 * rounding)
            name = str(self.qmodel.compute_dtype).removeprefix("torch.")
            note = f", PEFT's own in {name} {rounding:.1e}"
        print(
            f"reloaded in PEFT + transformers: logits {'agree' if difference < limit else 'DO NOT AGREE'} "
            f"(largest difference {difference:.1e}{note}, largest logit {scale:.1f})"
        )
        if difference >= limit:
            raise SystemExit(
                "the saved adapter does not give the same logits in PEFT (on CPUs with AVX-512, bitsandbytes "
                "itself is wrong for weights whose in_features is no multiple of 64)"
            )
        return difference

    def peft_logits(self, adapter: Path, batch: Any, compute_dtype: torch.dtype) -> torch.Tensor:
        """Logits of the base in bitsandbytes' 4 bits with the saved adapter, computed by PEFT."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
        )
        base = AutoModelForCausalLM.from_pretrained(
            self.source,
            dtype=self.qmodel.dtype,
            quantization_config=quantization,
            device_map={"": str(self.qmodel.device)},
        )
        with warnings.catch_warnings():
            # PEFT reads a renamed transformers attribute
            warnings.simplefilter("ignore", FutureWarning)
            peft = PeftModel.from_pretrained(base, adapter)
        # Train mode: in eval mode bitsandbytes repacks weights for an inference kernel of less accuracy.
        with torch.no_grad():
            logits: torch.Tensor = peft.train()(**batch, use_cache=False).logits
        return logits


def split(args: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples."""
    examples = read_jsonl(args.data) if args.data else dates(200 + args.held_out, args.seed)
    held = min(args.held_out, max(1, len(examples) // 5))
    return examples[held:], examples[:held]


def peak_rss() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def plot(log: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot([r["step"] for r in log], [r["loss"] for r in log], color="#2060a0", linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss on completions", yscale="log", title="QLoRA fine-tuning")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        main()
    except qlora_fx.QLoRAError as error:
        sys.exit(f"error: {error}")
