"""A step that runs out of memory: which errors say so, and a lower budget."""

from __future__ import annotations

import gc
import traceback

import torch

from ..model import QLoRAModel

SMALLEST = 0.05
"""A fraction below it is as good as nothing."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is the allocator's, on a GPU or on a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def lower_budget(qmodel: QLoRAModel) -> str:
    """Halve what a step may hold from forward to backward; returns what it is now, or "" where nothing is left."""
    budget = qmodel.memory_budget
    if budget == 0 or qmodel.programs.backend == "eager":
        return ""
    if budget is None:
        lower: int | float = 0.5
    elif isinstance(budget, float):
        lower = budget / 2 if budget / 2 > SMALLEST else 0.0
    else:
        lower = budget // 2
    qmodel.memory_budget = lower
    return f"{lower / 1e9:.2f} GB" if isinstance(lower, int) else f"{lower:g}"


def let_go(error: BaseException) -> None:
    """Free what the frames of a failed step hold."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
