"""Which keys each query of a mask sees, on a GPU: one launch that reads the mask once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._triton import has_triton_package

BLOCK = 1024
"""Keys that a program holds at a time."""

if has_triton_package():
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        shown, found, queries, keys, row_step, query_step, key_step, number,
        BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program per query of a row."""
        which = tl.program_id(0).to(tl.int64)
        line = shown + (which // queries) * row_step + (which % queries) * query_step
        first = keys
        seen = 0
        intervals = 0
        for block in range(BLOCKS):
            column = block * BLOCK + tl.arange(0, BLOCK)
            place = line + column * key_step
            here = tl.load(place, mask=column < keys, other=0) != 0
            before = tl.load(place - key_step, mask=(column > 0) & (column < keys), other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(here, column, keys), 0))
            seen += tl.sum(here.to(tl.int32), 0)
            intervals += tl.sum((here & ~before).to(tl.int32), 0)
        tl.store(found + which, tl.where(seen == 0, 0, first))
        tl.store(found + number + which, seen)
        tl.store(found + 2 * number + which, intervals)


def spans(shown: Tensor) -> Tensor:
    """int32 ``[3, rows, queries]``: the first key that a query sees, how many it sees, in how many intervals.

    Args:
        shown: boolean ``[rows, queries, keys]``, of any strides.
    """
    rows, queries, keys = shown.shape
    found = torch.empty((3, rows, queries), dtype=torch.int32, device=shown.device)
    launch: Any = kernel[(rows * queries,)]
    as_bytes = shown.view(torch.uint8)
    blocks = triton.next_power_of_2(triton.cdiv(keys, BLOCK))  # compiled anew for twice the length
    sizes = (queries, keys, *as_bytes.stride(), rows * queries)
    launch(as_bytes, found, *sizes, BLOCKS=blocks, BLOCK=BLOCK)
    return found
