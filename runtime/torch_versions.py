"""What differs between the releases of PyTorch that are supported, all of it and only here."""

from __future__ import annotations

import inspect
from typing import Any


def with_vectors(load: Any) -> dict[str, Any]:
    """Keywords with which Inductor's ``CppCodeCache.load`` compiles for the CPU's vector instructions.

    Since 2.13 it looks at the source for Inductor's own vector types, where nothing is said; before, it always did.
    """
    said = "needs_vec_isa" in inspect.signature(load).parameters
    return {"needs_vec_isa": True} if said else {}
