"""Seconds from a loaded model to the end of its first training step, in a fresh process each time.

    python benchmarks/cold_start.py

Three cases: an empty compiler cache; a second process with that cache; and the model twice as deep, with an
empty cache again (its weights are the model's own, each layer twice).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This folder comes last: its profile.py would hide Python's own.
sys.path = [str(ROOT / "examples"), *sys.path[1:], str(ROOT / "benchmarks")]


def main() -> None:
    import step as benchmark

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="local folder (default: SmolLM2-135M-Instruct)")
    p.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.model is None:
        from obtain import model_folder

        args.model = str(model_folder())
    if args.worker:
        work(args, benchmark)
        return
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        cases = [("empty cache", 1, one), ("second process", 1, one), ("twice as deep", 2, two)]
        found = {name: run(args.model, times, folder) for name, times, folder in cases}
    print(
        f"{benchmark.machine()}\n\n| case | transform s | first step s | together |\n|---|---|---|---|"
    )
    for name, (transform, first) in found.items():
        print(f"| {name} | {transform:.1f} | {first:.1f} | {transform + first:.1f} |")
    ratio = sum(found["twice as deep"]) / sum(found["empty cache"])
    print(f"\ntwice as deep / empty cache: {ratio:.2f}")


def run(model: str, times: int, cache: str) -> tuple[float, float]:
    command = [sys.executable, __file__, "--model", model, "--worker", str(times)]
    # Headers that Inductor compiled beforehand lie in the folder for temporary files.
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TMPDIR": cache}
    env["PYTHONWARNINGS"] = "ignore"
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    transform, first = json.loads(done.stdout.splitlines()[-1])
    return transform, first


def work(args: argparse.Namespace, benchmark: Any) -> None:
    import qlora_fx
    import torch
    from transformers import AutoModelForCausalLM

    warnings.filterwarnings("ignore")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=benchmark.fastest_dtype())
    if args.worker > 1:
        config = type(model.config)(**model.config.to_dict())
        config.num_hidden_layers *= args.worker
        config.layer_types = None
        deep = type(model)(config).to(model.dtype)
        state = model.state_dict()
        layers = model.config.num_hidden_layers
        for name, tensor in deep.state_dict().items():
            parts = name.split(".")
            if "layers" in parts:
                at = parts.index("layers") + 1
                parts[at] = str(int(parts[at]) % layers)
            tensor.copy_(state[".".join(parts)])
        model = deep
    batch = benchmark.batch(args, "text")
    torch.manual_seed(0)
    start = time.perf_counter()
    qmodel = qlora_fx.transform(model)
    middle = time.perf_counter()
    optimizer = qmodel.paged_optimizer(lr=1e-4)
    qmodel(**batch).loss.backward()
    optimizer.step()
    end = time.perf_counter()
    assert all(p.grad is not None for _, p in qmodel.adapter_parameters())
    print(json.dumps([middle - start, end - middle]))


if __name__ == "__main__":
    main()
