"""A cache of fixed room as a ring: where its oldest token lies is a number on the device, not a size.

# Note [A ring]
A recorded call must be the same call for every token, and a cache that grows makes it another one. So the graph takes the
whole of a cache's buffers, ``room`` tokens of which ``start`` are written, and believes that all ``room`` are earlier tokens, the
oldest of them masked: rows that are padded on the left, which every model takes. Token ``i`` of those that the model
believes in lies at ``(i + start) % room``: what is masked lies behind what was written. A call's own tokens are written at
``start`` afterwards.

Attention does not care in what order it meets its keys. So keys and values are read as they lie, and the mask is brought
into their order, once for all layers (``rolled``). Where attention is computed in another way, keys and values are brought
into the model's order (``unrolled``), which copies them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import ANY_STRIDES


def unrolled(past: Tensor, start: Tensor) -> Tensor:
    """A ring's tokens, the oldest first.

    Args:
        past: ``[room, ...]``.
        start: ``[]`` integer, on the same device.
    """
    room = past.shape[0]
    return past.index_select(0, (torch.arange(room, device=past.device) + start) % room)


def rolled(mask: Tensor, start: Tensor, past: Tensor) -> Tensor:
    """A mask, in the model's order, in the order of a ring's keys and the new keys behind them.

    Args:
        mask: ``[..., room + new tokens]``.
        start: as in ``unrolled``.
        past: any of the keys or values, ``[room, ...]``; only its size is read.
    """
    room, total = past.shape[0], mask.shape[-1]
    places = torch.arange(total, device=mask.device)
    return mask.index_select(-1, torch.where(places < room, (places - start) % room, places))


torch.library.define(
    "qlora_fx::unrolled", "(Tensor past, Tensor start) -> Tensor", tags=ANY_STRIDES
)
torch.library.impl("qlora_fx::unrolled", ["CPU", "CUDA"])(unrolled)
torch.library.register_fake("qlora_fx::unrolled")(lambda past, start: past.new_empty(past.shape))
torch.library.define(
    "qlora_fx::rolled", "(Tensor mask, Tensor start, Tensor past) -> Tensor", tags=ANY_STRIDES
)
torch.library.impl("qlora_fx::rolled", ["CPU", "CUDA"])(rolled)
torch.library.register_fake("qlora_fx::rolled")(
    lambda mask, start, past: mask.new_empty(mask.shape)
)
