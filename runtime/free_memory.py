"""How much memory a device has left."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

from .allocator import glibc

CGROUP = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` now, with those its allocator holds and does not use.

    On a CPU: what the system has available, within the limit of the process's cgroup (v2).
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + unused
    memory = psutil.virtual_memory()
    available = int(memory.available)
    limit = cgroup_bytes_left()
    left = (available if limit is None else min(available, limit)) + unused_in_heap()
    # What was given back from inside of the heap is both available and unused.
    return min(left, int(memory.total))


def cgroup_bytes_left() -> int | None:
    """What the process's cgroup still allows, with the files it caches; None where it sets no limit."""
    try:
        line = next(t for t in SELF.read_text().splitlines() if t.startswith("0::"))
        folder = CGROUP / line.removeprefix("0::").strip("/")
        if not (folder / "memory.max").is_file():
            folder = CGROUP
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stat = dict(t.split() for t in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError, StopIteration):
        return None
    if not limit.isdigit():
        return None
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))


class Mallinfo2(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def unused_in_heap() -> int:
    """Bytes that glibc keeps for the next allocation; 0 where it does not tell."""
    libc = glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = Mallinfo2
    return int(libc.mallinfo2().fordblks)
