"""What the examples with TRL share: their arguments, their trainer's settings, what they print."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from obtain import model_folder


def arguments(text: str, *, out: str, steps: int) -> argparse.Namespace:
    """``--model``, ``--out`` and ``--steps``; ``text`` is the example's own docstring."""
    p = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="hub id or folder (default: SmolLM2-135M-Instruct from a wheel)")
    p.add_argument("--out", default=out, help="folder (default: %(default)s)")
    p.add_argument(
        "--steps", type=int, default=steps, help="optimizer steps (default: %(default)s)"
    )
    args = p.parse_args()
    args.model = args.model or str(model_folder())
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of either trainer's config."""
    return {
        "output_dir": args.out,
        "max_steps": args.steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-4,
        "logging_steps": 5,
        "optim": "paged_adamw_32bit",
        "activation_checkpointing": False,  # memory_budget decides what is computed again
        "bf16": False,  # compute_dtype decided already
        "report_to": [],
        "save_strategy": "no",
    }


def train(trainer: Any, args: argparse.Namespace, measures: list[str]) -> None:
    """Evaluate, train, evaluate, save; print each measure before and after."""
    before: Mapping[str, float] = trainer.evaluate()
    trainer.train()
    after: Mapping[str, float] = trainer.evaluate()
    trainer.save_model(args.out)
    for name in measures:
        print(f"{name}: {before[name]:.3f} -> {after[name]:.3f}")
    print(f"adapter: {args.out}; PeftModel.from_pretrained(base, {args.out!r}) loads it")
