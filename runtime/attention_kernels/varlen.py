"""Masks that show each query one interval of keys, as sequences for FlashAttention's varlen form.

Padding on either side, several documents or pictures in a row, a window: what such masks hide is not computed, and no bias
of ``[queries, keys]`` is read. The mask is read once per call of the model, by one launch; three numbers of each query go to
the host, which waits for them, finds the sequences and sends back where they start.

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
from torch.nn.functional import pad

from ..gpu import runs_triton
from . import spans_triton
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


def sequences_of(mask: Tensor) -> tuple[int, Tensor]:
    """What a boolean mask ``[rows, 1, sequence, sequence]`` is, and where its sequences start. Note [Sequences].

    Waits for the device once.

    Returns:
        ``CAUSAL``'s code, a ``Varlen``'s, or ``ANY``. For a ``Varlen`` int32 ``[4, 3, rows, sequence]`` on the mask's device:
        queries and keys of the first call, queries and keys of the second, each flat and as long as it is needed (``calls``).
    """
    rows, heads, queries, keys = mask.shape
    starts = torch.empty((4, 3, rows, queries), dtype=torch.int32, device=mask.device)
    if mask.dtype != torch.bool or heads != 1 or queries != keys or not mask.numel():
        return ANY, starts
    runs = Runs.of(spans(mask))
    code = code_of(runs)
    kind = Varlen.of(code)
    if kind is not None:
        lines = starts.flatten(1)
        found = starts_of(runs, kind.sequences + 1)[:, : lines.shape[1]].to(torch.int32)
        lines[:, : found.shape[1]] = found.to(mask.device)
    return code, starts


def spans(mask: Tensor) -> Tensor:
    """int64 ``[3, rows, queries]`` on the CPU: the first key that a query sees, how many it sees, in how many intervals."""
    shown = mask[:, 0]
    if runs_triton(mask.device):
        return spans_triton.spans(shown).cpu().long()
    edges = shown[..., 1:] & ~shown[..., :-1]
    found = [shown.to(torch.uint8).argmax(-1), shown.sum(-1), edges.sum(-1) + shown[..., 0]]
    return torch.stack(found).cpu()


class Runs(NamedTuple):
    """The runs of a mask's queries. All are ``[rows, sequence]``, on the CPU.

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
    def of(cls, found: Tensor) -> Runs:
        """Of ``spans``."""
        first, seen, intervals = found
        position = torch.arange(first.shape[1])
        own = (first <= position) & (position < first + seen)  # if it is one interval
        same = (first[:, 1:] == first[:, :-1]) & (seen[:, 1:] == seen[:, :-1]) & ~own[:, :-1]
        same = pad(same, (1, 1))
        others = ~own & ~same[:, :-1]
        goes_on = same[:, 1:] & pad(~own[:, 1:], (0, 1))
        starts = own & (first == position)
        return cls(first, seen, intervals <= 1, own, starts, others, ~own & ~goes_on)


def code_of(runs: Runs) -> int:
    rows, length = runs.own.shape
    position = torch.arange(length)
    last = runs.first + runs.seen - 1
    behind = runs.others & (runs.seen > 0)
    begun = torch.where(runs.starts, position, -1).cummax(-1).values
    interrupted = torch.where(runs.own, -1, position).cummax(-1).values

    def always(condition: Tensor) -> bool:
        return bool((condition | ~runs.own).all())

    if not (
        bool((runs.whole & (runs.own | (last < position))).all())
        and bool((behind.sum(-1) <= 1).all())
        and always(begun > interrupted)
    ):
        return ANY
    is_all, up_to_itself = always(runs.first == begun), always(last == position)
    if up_to_itself and bool(runs.own.all()) and not bool(runs.first.any()):
        return CAUSAL.code
    window = int(torch.where(runs.own, runs.seen, 0).amax())
    in_window = torch.maximum(begun, position + 1 - window)
    boundary = torch.where(runs.starts | ~runs.own, position, length)
    following = pad(boundary[:, 1:], (0, 1), value=length)
    end = following.flip(-1).cummin(-1).values.flip(-1)
    is_causal = up_to_itself and always(runs.first == in_window)
    if length < LEAST or not (is_causal or (is_all and always(last == end - 1))):
        return ANY
    sequences = int(runs.starts.sum() + 2 * runs.others.sum())
    rounded = 1 << math.ceil(math.log2(max(1, sequences)))
    if rounded > MANY and rounded * SHORT > rows * length:
        return ANY
    return Varlen(is_causal, bool(behind.any()), rounded, 0 if is_all else window).code


def starts_of(runs: Runs, least: int) -> Tensor:
    """int64 ``[4, columns]``, at least so many: the lines of ``sequences_of``."""
    rows, length = runs.own.shape
    total = rows * length
    begins = at(runs.starts | runs.others)
    with_itself = [
        torch.cat([begins, at(runs.ends) + 1]).sort().values,
        torch.cat([begins, at(runs.others)]).sort().values,
    ]
    # Row by row: keys behind those that the row before sees, queries before the run, keys before those that it sees, the run,
    # queries behind it. No sequence is longer than a row.
    behind = runs.others & (runs.seen > 0)
    has = behind.any(-1, keepdim=True)
    place = behind.to(torch.uint8).argmax(-1, keepdim=True)
    end = (runs.ends & (runs.seen > 0)).to(torch.uint8).argmax(-1, keepdim=True) + 1
    offset = length * torch.arange(rows)[:, None]
    seen_from = torch.where(has, runs.first.gather(1, place), 0) + offset
    seen_to = torch.where(has, runs.seen.gather(1, place), 0) + seen_from
    before = pad(seen_to[:-1], (0, 0, 1, 0))
    start, end = (offset + torch.where(has, t, length) for t in (place, end))
    with_what_is_before = [
        torch.cat([offset, offset, start, start, end], 1).flatten(),
        torch.cat(
            [torch.cat([before, offset, offset, seen_from, seen_to], 1).flatten(), seen_to[-1]]
        ),
    ]
    lines = [*with_itself, *with_what_is_before]
    columns = max(least, 5 * rows + 2)
    return torch.stack([pad(line, (0, columns - len(line)), value=total) for line in lines])


def at(marked: Tensor) -> Tensor:
    """Which of all tokens are marked."""
    return marked.flatten().nonzero().flatten()
