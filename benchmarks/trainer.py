"""A step of TRL's SFTTrainer over a QLoRAModel, beside the same trainer over PEFT + bitsandbytes.

    python benchmarks/trainer.py --rounds 3

Both stacks are in one process and train in turns on rows of ``--tokens`` tokens of one text; what is printed is the time
between two optimizer steps as a callback sees it, the median of the rounds. A lower bound is in ``benchmarks/step.py``'s
table: the products of the linears. Nothing else may run meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT / "examples"), *sys.path[1:], str(ROOT / "benchmarks")]
OURS = ("qlora_fx", "qlora_fx, memory_budget=0.0")
REFERENCES = ("PEFT + bitsandbytes", "PEFT + bitsandbytes, gradient checkpointing")
"""In the dtype that multiplies faster on this machine, as ours."""


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokens", type=int, default=512, help="per row (default: %(default)s)")
    p.add_argument("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=3, help="turns per stack (default: %(default)s)")
    p.add_argument("--steps", type=int, default=4, help="per turn (default: %(default)s)")
    args = p.parse_args()

    import qlora_fx  # noqa: F401 (its filter of bitsandbytes' advice comes first)
    from obtain import model_folder

    args.model = str(model_folder())
    runs = {name: Run(args, name) for name in OURS + REFERENCES}
    for _ in range(args.rounds + 1):  # the first turn compiles
        for run in runs.values():
            run.turn()
    fastest = min(r.seconds(args) for name, r in runs.items() if name in REFERENCES)
    print(f"SFTTrainer: 1 x {args.tokens} tokens, r={args.rank}, median of {args.rounds} turns\n")
    print("| stack | step s (min-max) | x fastest reference | last loss | gradient norm |")
    print("|---|---|---|---|---|")
    for name, run in runs.items():
        times = run.times[args.steps :]
        print(
            f"| {name} | {run.seconds(args):.2f} ({min(times):.2f}-{max(times):.2f}) "
            f"| {run.seconds(args) / fastest:.2f} | {run.last['loss']:.3f} | {float(run.last['grad_norm']):.3f} |"
        )


class Run:
    """One stack under its trainer."""

    def __init__(self, args: argparse.Namespace, stack: str) -> None:
        import step
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from trl import SFTConfig, SFTTrainer

        recompute = stack.endswith("checkpointing")
        args.worker = str(step.fastest_dtype()) + ("-ckpt" if recompute else "")
        args.worker = args.worker.replace("bfloat16", "bf16")
        if stack in OURS:
            options = {"memory_budget": 0.0} if "budget" in stack else {}
            model, _ = step.ours(args, **options)
        else:
            model, _ = step.reference(args)
        text = (ROOT / "tests" / "data" / "alice.txt").read_text()
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ids = tokenizer(text)["input_ids"]
        ids = ids * (2 + (64 * 97 + args.tokens) // len(ids))
        rows = [ids[i * 97 : i * 97 + args.tokens] for i in range(64)]
        times = self.times = []
        started = 0.0

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                nonlocal started
                started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                times.append(time.perf_counter() - started)

        self.trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                "build/trainer",
                max_steps=args.steps,
                per_device_train_batch_size=1,
                logging_steps=1,
                learning_rate=1e-4,
                optim="paged_adamw_32bit",
                gradient_checkpointing=recompute,
                bf16=False,
                max_length=args.tokens,
                report_to=[],
                save_strategy="no",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )

    def turn(self) -> None:
        self.trainer.train()

    def seconds(self, args: argparse.Namespace) -> float:
        """Median of all turns but the first."""
        return statistics.median(self.times[args.steps :])

    @property
    def last(self) -> dict[str, Any]:
        """What was logged at the last step."""
        return [row for row in self.trainer.state.log_history if "grad_norm" in row][-1]


if __name__ == "__main__":
    main()
