"""Which GPU, and what it can do."""

from __future__ import annotations

import functools

import torch
from torch.utils._triton import has_triton_package

TRITON = (7, 0)
"""The compute capability from which on Triton compiles for a device."""
BFLOAT16 = (8, 0)
"""The one from which on devices multiply in bfloat16, and FlashAttention-2 runs (CUDA C++ Programming Guide)."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device: ``(9, 0)`` for Hopper."""
    return torch.cuda.get_device_capability(device)


def numbered(device: torch.device) -> torch.device:
    """The device as its tensors name it: "cuda" is the current one, ``cuda:0`` for instance."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def runs_triton(device: torch.device) -> bool:
    """Whether kernels in Triton can run there."""
    return device.type == "cuda" and has_triton_package() and capability(device) >= TRITON
