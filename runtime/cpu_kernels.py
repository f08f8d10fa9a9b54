"""Kernels of ours for CPUs: C++ beside the Python that calls it.

A file is compiled once per machine with Inductor's settings and kept in Inductor's cache.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import Any

from .torch_versions import with_vectors

FUSED = ("-ffp-contract=fast",)
"""Flags with which a product and a sum may be one instruction, as in PyTorch's own products."""
DONE = 0
"""What a function returns that ``run`` calls; anything else: there was no memory for what it copies."""


@functools.cache
def compiled(file: str, flags: tuple[str, ...] = ()) -> Any:
    """The functions of a C++ file in this folder; None where it cannot be compiled.

    Takes some seconds where the file is not in the cache. A file that cannot be compiled is told once: what is computed in
    its place is right, and slower.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.exc import CppCompileError

    source = (Path(__file__).parent / file).read_text(encoding="ascii")
    try:
        how = with_vectors(CppCodeCache.load_async)
        return CppCodeCache.load(source, extra_flags=flags, **how)
    except (CppCompileError, OSError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(
            f"{file} cannot be compiled here, so PyTorch's own kernels compute what it would, in more time "
            f"({type(error).__name__}: {reason})",
            stacklevel=2,
        )
        return None


def run(function: Any, arguments: ctypes.Structure) -> None:
    """Call a function of ``compiled`` that takes a pointer to its arguments.

    Raises:
        MemoryError: there was none.
    """
    if function(ctypes.byref(arguments)) != DONE:
        raise MemoryError(f"no memory for the copies of {type(arguments).__qualname__}")
