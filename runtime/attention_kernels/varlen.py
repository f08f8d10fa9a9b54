"""Masks that show each query one interval of keys, as sequences for FlashAttention's varlen form.

Padding on either side, several documents or pictures in a row, a window: what such masks hide is not computed, and no bias
of ``[queries, keys]`` is read. All is counted on the GPU; the host learns one number, once per call of the model.

# Note [Sequences]
Tokens of all rows lie one behind the other, and are cut into runs of queries:

- *sequences*: queries that see their own position. Each sees its sequence, up to itself in a causal mask, in a window of it
  if there is one;
- *blind*: queries that see nothing, such as padding in front;
- *behind*: queries that see keys before them, but not themselves: padding behind a causal or whole sequence, which sees all of
  it. At most one run per row.

A varlen kernel takes the starts of queries and of keys, and sequence ``i`` of queries meets sequence ``i`` of keys. Two
calls compute all: one of every sequence with itself, and, where there are such, one of what is behind with what it sees.
In either, what is not computed is a sequence of no keys (zeros come out), and keys that nobody sees one of no queries.
What is left of a tensor of fixed size is filled with the number of all tokens: empty sequences.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .kernel import ANY, CAUSAL

LEAST = 8
"""Shorter rows are left to other kernels: there may be more starts than tokens."""


MANY, SHORT = 64, 32
"""More sequences than this, of fewer tokens on average, are left to other kernels: FlashAttention's backward keeps 128 rows
of sums for each."""


class Varlen(NamedTuple):
    """What the host must know of such a mask, to launch the kernels.

    Attributes:
        causal: whether a query sees its sequence up to itself only.
        behind: whether the second call is needed.
        sequences: how many the first call has, the next power of two.
        window: how many keys a query sees at most; 0 for all.
    """

    causal: bool
    behind: bool
    sequences: int
    window: int

    @property
    def code(self) -> int:
        """All of it in one number, above ``CAUSAL``'s."""
        log = self.sequences.bit_length() - 1
        return (self.window << 10) | (log << 4) | (self.behind << 3) | (self.causal << 2) | 2

    @classmethod
    def of(cls, code: int) -> Varlen | None:
        """What a code says; None if it is another kind's."""
        if code & 3 != 2:
            return None
        return cls(bool(code & 4), bool(code & 8), 1 << ((code >> 4) & 63), code >> 10)


class Runs(NamedTuple):
    """The runs of a mask's queries. All are ``[rows, sequence]``.

    Attributes:
        first: the first key that a query sees.
        seen: how many it sees.
        whole: whether what it sees is one interval.
        own: whether it sees its own position.
        starts: whether a sequence begins here.
        others: whether a run begins here that is none.
        ends: whether a run that is none ends here.
    """

    first: Tensor
    seen: Tensor
    whole: Tensor
    own: Tensor
    starts: Tensor
    others: Tensor
    ends: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Runs:
        """
        Args:
            mask: boolean, ``[rows, 1, sequence, sequence]``.
        """
        shown = mask[:, 0]
        position = torch.arange(shown.shape[1], device=shown.device)
        seen = shown.sum(-1)
        first = shown.to(torch.uint8).argmax(-1)
        whole = (shown[..., 1:] & ~shown[..., :-1]).sum(-1) + shown[..., 0] <= 1
        own = shown.diagonal(dim1=1, dim2=2)
        same = (first[:, 1:] == first[:, :-1]) & (seen[:, 1:] == seen[:, :-1]) & ~own[:, :-1]
        same = torch.nn.functional.pad(same, (1, 1))
        others = ~own & ~same[:, :-1]
        goes_on = same[:, 1:] & torch.nn.functional.pad(~own[:, 1:], (0, 1))
        starts = own & (first == position)
        return cls(first, seen, whole, own, starts, others, ~own & ~goes_on)


def mask_code(mask: Tensor) -> int:
    """``CAUSAL``'s code, a ``Varlen``'s, or ``ANY``. Waits for the device once."""
    rows, heads, queries, keys = mask.shape
    if mask.dtype != torch.bool or heads != 1 or queries != keys or not mask.numel():
        return ANY
    runs = Runs.of(mask)
    position = torch.arange(queries, device=mask.device)
    last = runs.first + runs.seen - 1
    begun = torch.where(runs.starts, position, -1).cummax(-1).values
    interrupted = torch.where(runs.own, -1, position).cummax(-1).values
    boundary = torch.where(runs.starts | ~runs.own, position, queries)
    following = torch.nn.functional.pad(boundary[:, 1:], (0, 1), value=queries)
    end = following.flip(-1).cummin(-1).values.flip(-1)
    window = torch.where(runs.own, runs.seen, 0).amax()
    in_window = torch.maximum(begun, position + 1 - window)
    behind = runs.others & (runs.seen > 0)
    allowed = runs.whole & (runs.own | (last < position))

    def always(condition: Tensor) -> Tensor:
        return (condition | ~runs.own).all()

    found = torch.stack(
        [
            allowed.all() & (behind.sum(-1) <= 1).all() & always(begun > interrupted),
            always((runs.first == 0) & (last == position)) & runs.own.all(),
            always(last == position) & always(runs.first == in_window),
            always(runs.first == begun),
            always(last == end - 1),
            behind.any(),
            (runs.starts.sum() + 2 * runs.others.sum()),
            window,
        ]
    ).tolist()
    is_fit, is_causal, up_to_itself, is_all, to_the_end, has_behind, sequences, width = found
    if not is_fit:
        return ANY
    if is_causal:
        return CAUSAL.code
    if queries < LEAST or not (up_to_itself or (is_all and to_the_end)):
        return ANY
    rounded = 1 << max(0, math.ceil(math.log2(max(1, sequences))))
    if rounded > MANY and rounded * SHORT > rows * queries:
        return ANY
    return Varlen(bool(up_to_itself), bool(has_behind), rounded, 0 if is_all else width).code


def cu_seqlens_of(mask: Tensor) -> Tensor:
    """Where sequences start, for any mask; to be used where ``mask_code`` says ``Varlen``. Note [Sequences].

    Returns:
        int32 ``[4, 3, rows, sequence]``: each of the four, flat, has starts and then the number of all tokens over and over.
        Queries and keys of the first call, queries and keys of the second.
    """
    rows, _, length, _ = mask.shape
    total = rows * length
    runs = Runs.of(mask)
    offset = length * torch.arange(rows, device=mask.device)[:, None]
    position = offset + torch.arange(length, device=mask.device)
    begins = torch.where(runs.starts | runs.others, position, total)
    with_itself = [
        torch.stack([begins, torch.where(runs.ends, position + 1, total)]),
        torch.stack([begins, torch.where(runs.others, position, total)]),
    ]
    # Row by row: keys behind those that the row before sees, queries before the run, keys before those that it sees, the run,
    # queries behind it. No sequence is longer than a row.
    behind = runs.others & (runs.seen > 0)
    has = behind.any(-1, keepdim=True)
    place = behind.to(torch.uint8).argmax(-1, keepdim=True)
    end = (runs.ends & (runs.seen > 0)).to(torch.uint8).argmax(-1, keepdim=True) + 1
    seen_from = torch.where(has, runs.first.gather(1, place), 0) + offset
    seen_to = torch.where(has, runs.seen.gather(1, place), 0) + seen_from
    before = torch.nn.functional.pad(seen_to[:-1], (0, 0, 1, 0))
    start, end = (offset + torch.where(has, t, length) for t in (place, end))
    with_what_is_before = [
        torch.cat([offset, offset, start, start, end], 1),
        torch.cat([before, offset, offset, seen_from, seen_to], 1),
    ]
    last = torch.stack([seen_to.new_full((1,), total), seen_to[-1]])
    found = torch.cat([torch.stack(with_what_is_before).flatten(1), last], 1)
    in_order = torch.stack(with_itself).flatten(1).sort(-1).values
    lines = [
        torch.nn.functional.pad(part, (0, 3 * total - part.shape[1]), value=total)
        for part in (in_order, found)
    ]
    return torch.cat(lines).to(torch.int32).view(4, 3, rows, length)
