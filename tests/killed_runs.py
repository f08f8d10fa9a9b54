"""Kill a training run at random moments, go on from its last checkpoint, and compare what comes out.

    python tests/killed_runs.py FOLDER KILLS

The model is made once; each run is a fork of this process. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import qlora_fx
import torch
from datasets import Dataset
from peft import LoraConfig
from qlora_fx.training import checkpoint, reliable
from qlora_fx.transformers_internals import last_checkpoint
from safetensors.torch import load_file
from small_models import tiny_llama
from transformers import Trainer, TrainingArguments

STEPS = 12


def model() -> qlora_fx.QLoRAModel:
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    made = qlora_fx.transform(tiny_llama(1), lora, compute_dtype="float32", backend="eager")
    rows = torch.ones(2, 16, dtype=torch.long)
    made(input_ids=rows, labels=rows)  # captured; no backward, whose threads a fork would not have
    return made


def train(qmodel: Any, folder: Path) -> None:
    """To the end, from the last checkpoint if there is one."""
    torch.set_num_threads(1)
    ids = torch.randint(2, 101, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        optim="paged_adamw_8bit",
        save_steps=2,
        save_total_limit=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    trainer: Any = reliable(Trainer)(model=qmodel, args=args, train_dataset=data)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    qmodel.save_pretrained(folder / "final")


def forked(qmodel: Any, folder: Path, kill_after: float | None = None) -> tuple[bool, float]:
    """Whether a run came to its end, and how long it took."""
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(folder.with_suffix(".txt"), "a")  # noqa: SIM115
            train(qmodel, folder)
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(folder.with_suffix(".txt").read_text())
    return os.WIFEXITED(status), time.perf_counter() - start


def main() -> None:
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    draw = random.Random(0)
    qmodel = model()
    folder.mkdir(parents=True, exist_ok=True)
    _, seconds = forked(qmodel, folder / "whole")
    true = load_file(folder / "whole" / "final" / "adapter_model.safetensors")
    killed = finished = seen = 0
    steps = set()
    while killed < kills or not finished:
        run = folder / f"run{finished}"
        limit = draw.uniform(0.0, seconds) if killed < kills else None
        ended, _ = forked(qmodel, run, limit)
        killed += not ended
        for found in run.glob("checkpoint-*"):
            checkpoint.check(found, qmodel.base)
            assert (found / checkpoint.STAMP).exists()
            steps.add(found.name)
            seen += 1
        if ended:
            finished += 1
            final = load_file(run / "final" / "adapter_model.safetensors")
            assert all(torch.equal(final[key], value) for key, value in true.items())
    print(
        json.dumps(
            {"killed": killed, "finished": finished, "checkpoints": seen, "steps": len(steps)}
        )
    )


if __name__ == "__main__":
    main()
