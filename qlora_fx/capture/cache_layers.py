"""Layers of a cache: one that grows in place, and what it is while the model is traced.

# Note [A cache that grows in place]
A graph takes the keys and values of earlier tokens as inputs and returns those of its own tokens, which are written
behind the earlier ones: nothing else is copied per token. A cache is held with its tokens outermost, ``[tokens, batch,
heads, size]``: the beginning of a buffer is a contiguous tensor then, and a graph for it is right for any buffer.
An encoder-decoder's keys and values of the encoder's states are returned by the first call and inputs of all later ones,
as they are.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import users_stacklevel
from ..runtime.ops import ops
from ..runtime.torch_versions import unnoticed_by_autograd
from ..transformers_internals import DynamicLayer

OUTERMOST, INNER = (2, 0, 1, 3), (1, 2, 0, 3)
"""From ``[batch, heads, tokens, size]`` to ``[tokens, batch, heads, size]``, and back."""
SMALLEST = 256
"""Tokens that a buffer has room for at least."""
KEPT_SHAPES, KEPT_AT_ONCE = 8, 4
"""Of buffers that are lent: sizes of batches and rooms, and caches that live at the same time."""


class Buffers:
    """Buffers for the caches of a model whose calls are recorded. Note [A ring].

    A recording reads a cache where it lies, so the next cache is given what one has left that is no more: the same
    addresses, layer by layer. All are zeroed first, for what is masked must be finite.

    Attributes:
        made: by what the recordings see (room, shapes, dtypes), and by layer, one for each cache that lived at the same time.
    """

    def __init__(self) -> None:
        self.made: dict[Any, dict[int, list[tuple[Tensor, ...]]]] = {}
        self.borrowers: dict[int, weakref.ref[GrowingLayer]] = {}
        self.warned = False

    def lend(
        self, layer: GrowingLayer, room: int, rows: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | None:
        """``[room, batch, heads, size]`` for keys and for values like ``rows``; None where as many are kept as may be."""
        key = (room, *((t.shape[1:], t.dtype, t.device) for t in rows))
        if key not in self.made and len(self.made) == KEPT_SHAPES:
            self.warn(f"of {KEPT_SHAPES} shapes and rooms")
            return None
        several = self.made.setdefault(key, {}).setdefault(layer.number, [])
        for tensors in several:
            borrower = self.borrowers[id(tensors)]()
            if borrower is None or borrower.buffers is not tensors:
                for t in tensors:
                    t.zero_()
                break
        else:
            if len(several) == KEPT_AT_ONCE:
                self.warn(f"{KEPT_AT_ONCE} at the same time")
                return None
            tensors = tuple(t.new_zeros(room, *t.shape[1:]) for t in rows)
            several.append(tensors)
        self.borrowers[id(tensors)] = weakref.ref(layer)
        return tensors

    def warn(self, kept: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"cuda_graphs: tokens of caches {kept} are recorded, and others run without; fewer sizes of batches are faster",
                stacklevel=users_stacklevel(),
            )

    def has_lent(self, layer: GrowingLayer) -> bool:
        """Whether a layer's buffers are from here, and its alone."""
        borrower = self.borrowers.get(id(layer.buffers))
        return borrower is not None and borrower() is layer

    def __deepcopy__(self, memo: Any) -> Buffers:
        return self  # the copy of a cache has buffers of its own


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a ``DynamicCache`` whose ``keys`` and ``values`` are views of buffers with room behind them.

    To everybody else it is a ``DynamicLayer``: it may be cropped, reordered, repeated, copied, or given other tensors. The
    next call of the model copies those to buffers of their own.

    Args:
        number: of the layer in its cache.
        source: who lends buffers; default: they are made.

    Attributes:
        buffers: ``[room, batch, heads, size]`` of keys and of values.
        written: how many tokens they hold.
        given: keys or values that somebody has put into the place of those.
    """

    def __init__(self, number: int = 0, source: Buffers | None = None) -> None:
        self.given: dict[str, Tensor | None] = {}
        super().__init__()
        self.number, self.source = number, source
        self.buffers: tuple[Tensor, ...] = ()
        self.written = 0

    @property
    def keys(self) -> Tensor | None:
        """``[batch, heads, tokens, size]``, a view; None of an empty layer. ``values``, too."""
        return self.given["keys"] if "keys" in self.given else self.shown(0)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self.given["keys"] = states

    @property
    def values(self) -> Tensor | None:
        return self.given["values"] if "values" in self.given else self.shown(1)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self.given["values"] = states

    def shown(self, part: int) -> Tensor:
        return self.buffers[part][: self.written].permute(INNER)

    def get_seq_length(self) -> int:
        return super().get_seq_length() if self.given else self.written

    def settle(self) -> None:
        """Hold in buffers of its own what somebody has put there."""
        if not self.given:
            return
        states = [t for t in (self.keys, self.values) if t is not None and t.numel()]
        lent = bool(self.buffers) and self.source is not None
        self.buffers, self.written = (), 0
        if not states:
            return
        rows = tuple(t.permute(OUTERMOST) for t in states)
        if lent:  # they may lie in what will be lent anew
            rows = tuple(t.clone() for t in rows)
        grow([self], [rows])

    def make_room(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Where further keys and values, ``[tokens, batch, heads, size]``, are to be written; they are shown from now on."""
        start, total = self.written, self.written + rows[0].shape[0]
        if not self.buffers or total > self.buffers[0].shape[0]:
            self.buffers = self.larger(total, rows)
            self.dtype, self.device = rows[0].dtype, rows[0].device
        self.written, self.is_initialized = total, True
        self.given.clear()
        return tuple(b[start:total] for b in self.buffers)

    def larger(self, total: int, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Buffers with room for so many tokens, and what was in the old ones."""
        room = max(SMALLEST, 1 << (total - 1).bit_length())
        with torch.inference_mode(False):  # they outlive the mode
            found = None if self.source is None else self.source.lend(self, room, rows)
            if found is None:
                found = tuple(t.new_empty(room, *t.shape[1:]) for t in rows)
        for new, old in zip(found, self.buffers, strict=False):
            new[: self.written] = old[: self.written]
        return found

    def past(self) -> tuple[Tensor, ...]:
        """Keys and values ``[tokens, batch, heads, size]``, the beginnings of ``buffers``; none of an empty layer."""
        return tuple(b[: self.written] for b in self.buffers)


def grow(layers: Sequence[GrowingLayer], rows: Sequence[tuple[Tensor, ...]]) -> None:
    """Add keys and values of further tokens, ``[tokens, batch, heads, size]``, to each layer: on a GPU by one launch for all."""
    places: list[Tensor] = []
    values: list[Tensor] = []
    for layer, new in zip(layers, rows, strict=True):
        for place, row in zip(layer.make_room(new), new, strict=True):
            flat = (
                row.is_contiguous()
            )  # one launch takes equal strides, of dimensions of size 1, too
            places.append(place.view(-1) if flat else place)
            values.append((row.view(-1) if flat else row).detach())
    if values:
        with unnoticed_by_autograd(tuple(places)):  # what it has saved of them lies before
            torch._foreach_copy_(places, values)


class TracedLayer(DynamicLayer):  # type: ignore[misc]
    """What a layer of a cache is while the model is traced.

    Args:
        past: keys and values of earlier tokens, ``[tokens, batch, heads, size]``; none in a cache that is empty.

    Attributes:
        start: of the ring that they are; None where they lie in their order.
        rows: of the tokens of this call.
    """

    def __init__(self, *past: Tensor) -> None:
        super().__init__()
        self.past = past
        self.start: Tensor | None = None
        self.rows: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states: tuple[Tensor, ...] = (key_states, value_states)
        self.rows = tuple(t.permute(OUTERMOST) for t in states)
        if self.past:
            past = self.past
            if self.start is not None:
                past = tuple(ops.unrolled(t, self.start) for t in past)
            before = (t.permute(INNER) for t in past)
            states = tuple(torch.cat(pair, dim=-2) for pair in zip(before, states, strict=True))
        self.keys, self.values = keys, values = states
        self.is_initialized = True
        return keys, values

    def get_seq_length(self) -> int:
        if self.is_initialized:
            return self.keys.shape[-2]
        return self.past[0].shape[0] if self.past else 0
