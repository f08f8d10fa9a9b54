"""Where the time of one training step goes, by kind of operation, as a table and a picture.

    python benchmarks/profile.py [--workload text] [--out profile.png] [--disable attention ...]

Compiled code is built with Inductor's own marks around each kernel, so it is compiled anew. Times are what
each operation took itself, without those it called; what no operation accounts for is Python and waiting.
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# This folder comes last: its profile.py would hide Python's own.
sys.path = [str(ROOT / "examples"), *sys.path[1:], str(ROOT / "benchmarks")]

KINDS = {
    "base products": "linears of the frozen model, without the head",
    "LoRA products": "products with lora_A or lora_B, and their gradients",
    "head and loss": "products and softmax of qlora_fx::linear_cross_entropy",
    "attention": "products and softmax of attention",
    "dequantize": "bitsandbytes' 4-bit and blockwise kernels",
    "pointwise": "Inductor's kernels: norms, rotary embedding, activations, sums",
    "optimizer": "bitsandbytes' update",
    "other": "allocation, views, Python in operators, autograd",
}


def main() -> None:
    import step as benchmark

    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", help="local folder (default: SmolLM2-135M-Instruct)")
    p.add_argument("--workload", default="text", choices=list(benchmark.WORKLOADS))
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--disable", nargs="*", default=[], help="passes to leave out")
    p.add_argument("--out", default="profile.png", help="where to write the picture")
    args = p.parse_args()
    if args.model is None:
        from obtain import model_folder

        args.model = str(model_folder())
    warnings.filterwarnings("ignore", message=".*does not page optimizer state.*")
    times, wall = measure(args, benchmark)
    times["other"] += max(0.0, wall - sum(times.values()))
    lines = [f"{args.workload}, r={args.rank}, {benchmark.machine()}; one step {wall:.0f} ms", ""]
    lines += ["| kind | ms | share | what |", "|---|---|---|---|"]
    for kind, what in KINDS.items():
        lines.append(f"| {kind} | {times[kind]:.0f} | {times[kind] / wall:.0%} | {what} |")
    print("\n".join(lines))
    draw(times, lines[0], args.out)
    print(f"\n{args.out}")


def measure(args: argparse.Namespace, benchmark: Any) -> tuple[dict[str, float], float]:
    """Milliseconds by kind, and of the whole step, without the profiler."""
    import torch
    from torch._inductor import config as inductor
    from torch.profiler import ProfilerActivity, profile

    inductor.cpp.enable_kernel_profile = True
    model, _ = benchmark.ours(args, disable=args.disable)
    optimizer = model.paged_optimizer(lr=1e-4)
    inputs = benchmark.batch(args, args.workload)

    def step() -> None:
        optimizer.zero_grad()
        model(**inputs).loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    walls = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        walls.append(1e3 * (time.perf_counter() - start))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    times: dict[str, float] = collections.defaultdict(float)
    for event in recorded.events():
        times[kind(event, args.rank)] += event.self_cpu_time_total / 1e3
    recorded_wall = sum(times.values())
    torch.manual_seed(0)
    wall = sorted(walls)[2]
    return collections.defaultdict(
        float, {k: v * min(1.0, wall / recorded_wall) for k, v in times.items()}
    ), wall


def kind(event: Any, rank: int) -> str:
    """The kind of one recorded operation, by its name, its callers and its shapes."""
    names = []
    at = event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    line = " ".join(names)
    if "linear_cross_entropy" in line:
        return "head and loss"
    if "qlora_fx::attention" in line or "scaled_dot_product" in line:
        return "attention"
    if "ptimizer" in line:
        return "optimizer"
    if "dequantize" in line:
        return "dequantize"
    if "cpp_fused" in event.name:
        return "pointwise"
    if event.name in ("aten::mm", "aten::addmm", "aten::bmm"):
        sizes = {size for shape in event.input_shapes for size in shape}
        return "LoRA products" if sizes & {rank, 2 * rank, 3 * rank} else "base products"
    return "other"


def draw(times: dict[str, float], title: str, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
    names = list(KINDS)[::-1]
    bars = axes.barh(names, [times[name] for name in names], color="#4878a8")
    axes.bar_label(bars, fmt="%.0f", padding=3)
    axes.set_xlabel("ms of one step")
    axes.set_title(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
