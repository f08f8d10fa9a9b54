"""Layers of a cache: one that grows in place, and what it is while the model is traced.

# Note [A cache that grows in place]
A graph takes the keys and values of earlier tokens as inputs and returns those of its own tokens, which are written
behind the earlier ones: nothing else is copied per token. A cache is held with its tokens outermost, ``[tokens, batch,
heads, size]``: the beginning of a buffer is a contiguous tensor then, and a graph for it is right for any buffer.
An encoder-decoder's keys and values of the encoder's states are returned by the first call and inputs of all later ones,
as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.torch_versions import unnoticed_by_autograd
from ..transformers_internals import DynamicLayer

OUTERMOST, INNER = (2, 0, 1, 3), (1, 2, 0, 3)
"""From ``[batch, heads, tokens, size]`` to ``[tokens, batch, heads, size]``, and back."""
SMALLEST = 256
"""Tokens that a buffer has room for at least."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a ``DynamicCache`` whose ``keys`` and ``values`` are views of buffers with room behind them.

    To everybody else it is a ``DynamicLayer``: it may be cropped, reordered, repeated, copied, or given other tensors. The
    next call of the model copies those to buffers of their own.

    Attributes:
        buffers: ``[room, batch, heads, size]`` of keys and of values.
        shown: the views of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: tuple[Tensor, ...] = ()
        self.shown: tuple[Tensor, ...] = ()

    def settle(self) -> None:
        """Hold what it shows in buffers of its own, if somebody has changed that."""
        states = (self.keys, self.values) if self.is_initialized else ()
        if len(states) == len(self.shown) and all(
            a is b for a, b in zip(states, self.shown, strict=True)
        ):
            return
        self.buffers, self.shown = (), ()
        if states and states[0].numel():
            self.grow(tuple(t.permute(OUTERMOST) for t in states))

    def grow(self, rows: tuple[Tensor, ...]) -> None:
        """Add keys and values of further tokens, ``[tokens, batch, heads, size]``."""
        start = self.shown[0].shape[2] if self.shown else 0
        total = start + len(rows[0])
        if not self.buffers or total > len(self.buffers[0]):
            room = max(SMALLEST, 1 << (total - 1).bit_length())
            with torch.inference_mode(False):  # they outlive the mode
                larger = tuple(t.new_empty(room, *t.shape[1:]) for t in rows)
            for new, old in zip(larger, self.buffers, strict=False):
                new[:start] = old[:start]
            self.buffers = larger
        with unnoticed_by_autograd(self.buffers):  # what it has saved of them lies before
            for buffer, row in zip(self.buffers, rows, strict=True):
                buffer[start:total] = row.detach()
        self.keys, self.values = self.shown = tuple(b[:total].permute(INNER) for b in self.buffers)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True

    def past(self) -> tuple[Tensor, ...]:
        """Keys and values ``[tokens, batch, heads, size]``, the beginnings of buffers of their own; none of an empty layer."""
        self.settle()
        return tuple(t.permute(OUTERMOST) for t in self.shown)


class TracedLayer(DynamicLayer):  # type: ignore[misc]
    """What a layer of a cache is while the model is traced.

    Args:
        past: keys and values of earlier tokens, ``[tokens, batch, heads, size]``; none in a cache that is empty.

    Attributes:
        rows: of the tokens of this call.
    """

    def __init__(self, *past: Tensor) -> None:
        super().__init__()
        self.past = past
        self.rows: tuple[Tensor, ...] = ()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states: tuple[Tensor, ...] = (key_states, value_states)
        self.rows = tuple(t.permute(OUTERMOST) for t in states)
        if self.past:
            before = (t.permute(INNER) for t in self.past)
            states = tuple(torch.cat(pair, dim=-2) for pair in zip(before, states, strict=True))
        self.keys, self.values = keys, values = states
        self.is_initialized = True
        return keys, values

    def get_seq_length(self) -> int:
        if self.is_initialized:
            return self.keys.shape[-2]
        return self.past[0].shape[0] if self.past else 0
