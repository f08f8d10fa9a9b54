"""``compute_dtype="auto"``: measure which dtype multiplies fastest on this device."""

from __future__ import annotations

import functools
import math
import time
from dataclasses import dataclass

import torch

from .gpu import BFLOAT16, capability

CANDIDATES = (torch.float32, torch.bfloat16)
"""Dtypes with at least bfloat16's range and accuracy. float16 has less range, so it is only used on demand."""


@dataclass(frozen=True)
class ComputeDtype:
    """The dtype in which linears multiply, and how it came about.

    Attributes:
        dtype: the choice.
        reason: one line for people: who chose it, with the measured GFLOP/s if it was measured.
    """

    dtype: torch.dtype
    reason: str


@functools.cache
def fastest(device: str) -> ComputeDtype:
    """Time one GEMM of training's shape, [512, 1024] x [1024, 1024], in each candidate dtype.

    The best of five runs counts, after one to warm up; of a dtype that takes twice as long as another no more are made.
    0.2 s on a two-core CPU. Cached per device. On a GPU
    such a product is mostly its launch, so nothing is timed: bfloat16 where the GPU has it, for its matrix units
    multiply that many times faster than float32; else float32, which is slow but right.
    """
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
        if capability(torch.device(device)) >= BFLOAT16:
            return ComputeDtype(torch.bfloat16, f"{name} has matrix units for it")
        return ComputeDtype(torch.float32, f"{name} has no bfloat16")
    rows, size = 512, 1024
    best: dict[torch.dtype, float] = {}
    for dtype in CANDIDATES:
        a = torch.ones(rows, size, dtype=dtype, device=device)
        b = torch.ones(size, size, dtype=dtype, device=device)
        limit = 2 * min(best.values(), default=math.inf)
        for run in range(6):
            best[dtype] = min(seconds(a, b), best.get(dtype, math.inf))
            if run and best[dtype] > limit:
                break
    choice = min(best, key=lambda d: best[d])
    flops = 2 * rows * size * size
    measured = ", ".join(
        f"{str(d).removeprefix('torch.')} {flops / s / 1e9:.0f}" for d, s in best.items()
    )
    return ComputeDtype(choice, f"fastest on {device}: GFLOP/s {measured}")


def seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.nn.functional.linear(a, b)
    return time.perf_counter() - start
