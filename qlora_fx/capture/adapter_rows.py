"""Rows of a batch with adapters of their own (PEFT's ``adapter_names``): the input of a graph that says which each has."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from ..errors import InputError
from ..passes.adapters import SLOT_OF_ROW
from .dynamic_shapes import main_input


def rows_of(values: Mapping[str, Any]) -> int | torch.SymInt:
    """Rows of a call's batch."""
    tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor) and v.dim()}
    main = main_input(tensors)
    return (next(iter(tensors.values())) if main is None else main).shape[0]


def tell_slots(values: MutableMapping[str, Any], slots: torch.Tensor, *, repeated: bool) -> None:
    """Put each row's slot among a call's arguments.

    Args:
        slots: int64 ``[rows]``.
        repeated: whether there may be several rows for each, one after another: beams.

    Raises:
        InputError: there are more slots than rows, or fewer.
    """
    rows = int(rows_of(values))
    times, rest = divmod(rows, len(slots)) if len(slots) else (0, rows)
    if rest or times < 1 or (times > 1 and not repeated):
        raise InputError(
            f"adapter_names has {len(slots)} names for {rows} rows; accepted: one for each row"
        )
    values[SLOT_OF_ROW] = slots.repeat_interleave(times) if times > 1 else slots


def take_slots(arguments: dict[str, Any]) -> None:
    """Take the input out of what the model is traced with, and let it be as long as the batch."""
    slots = arguments.pop(SLOT_OF_ROW, None)
    if slots is not None:
        torch._check(slots.shape[0] == rows_of(arguments))  # type: ignore[no-untyped-call]
