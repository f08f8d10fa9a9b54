"""Kernels of ours for CPUs: C++ beside the Python that calls it.

A file is compiled once per machine with Inductor's settings and kept in Inductor's cache.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

from .torch_versions import with_vectors

FUSED = ("-ffp-contract=fast",)
"""Flags with which a product and a sum may be one instruction, as in PyTorch's own products."""
DONE = 0
"""What every function returns; anything else: there was no memory for what it copies."""


@functools.cache
def compiled(file: str, flags: tuple[str, ...] = ()) -> Any:
    """The functions of a C++ file in this folder; None where it cannot be compiled.

    Each takes a pointer to its arguments, and returns ``DONE``. Takes some seconds where the file is not in the cache.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    source = (Path(__file__).parent / file).read_text(encoding="ascii")
    try:
        how = with_vectors(CppCodeCache.load_async)
        return CppCodeCache.load(source, extra_flags=flags, **how)
    except (CppCompileError, OSError, RuntimeError):
        return None


def run(function: Any, arguments: ctypes.Structure) -> None:
    """Call a function of ``compiled``.

    Raises:
        MemoryError: there was none.
    """
    if function(ctypes.byref(arguments)) != DONE:
        raise MemoryError(f"no memory for the copies of {type(arguments).__qualname__}")
