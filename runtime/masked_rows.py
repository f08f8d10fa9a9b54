"""Rows of one tensor in the places that a mask marks in another: features of pictures in a text's embeddings.

PyTorch's ``masked_scatter`` does it, but its backward counts the mask on the host, which waits for the device. Here backward
looks up where each row went.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .ops import ANY_STRIDES, ops


@torch.library.custom_op("qlora_fx::masked_rows", mutates_args=(), tags=ANY_STRIDES)
def masked_rows(x: Tensor, mask: Tensor, source: Tensor, exactly: bool) -> Tensor:
    """``x`` with the rows of ``source``, in their order, where ``mask`` is true.

    Args:
        x: ``[..., size]``.
        mask: boolean, of the other dimensions of ``x``.
        source: ``[rows, size]``; rows behind the last place are left over.
        exactly: there must be none.

    Raises:
        InputError: the mask marks more places than there are rows, or fewer and they must fit ``exactly``. On a GPU the
            device raises it, later.
    """
    number, rows = mask.flatten().cumsum(0), source.shape[0]
    places = number[-1:]
    fit = (places == rows if exactly else places <= rows).all()
    what = f"the {rows} features of its pictures or sounds; accepted: as many. A row cut short by a maximal length may have lost some"
    if number.device.type != "cpu":
        torch._assert_async(fit, f"a batch has other placeholders than {what}")
    elif not fit:
        raise InputError(f"a batch has {int(places)} placeholders for {what}")
    if not rows:
        return x.clone()
    taken = source.index_select(0, (number - 1).clamp_(0, rows - 1)).view(x.shape)
    return torch.where(mask[..., None], taken, x)


@masked_rows.register_fake
def _(x: Tensor, mask: Tensor, source: Tensor, exactly: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qlora_fx::rows_at", mutates_args=(), tags=ANY_STRIDES)
def rows_at(x: Tensor, mask: Tensor, rows: int) -> Tensor:
    """``[rows, size]``: those of ``x`` where ``mask`` is true, in their order, and zeros behind them."""
    number = mask.flatten().cumsum(0)
    wanted = torch.arange(1, rows + 1, device=x.device)
    places = torch.searchsorted(number, wanted)
    if not number.shape[0]:
        return x.new_zeros(rows, x.shape[-1])
    found = x.reshape(-1, x.shape[-1]).index_select(0, places.clamp_(max=number.shape[0] - 1))
    return torch.where((wanted <= number[-1])[:, None], found, 0)


@rows_at.register_fake
def _(x: Tensor, mask: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[-1])


def _context(ctx: Any, inputs: Any, output: Any) -> None:
    _, mask, source, _ = inputs
    ctx.save_for_backward(mask)
    ctx.rows = source.shape[0]


def _backward(ctx: Any, grad: Tensor) -> Any:
    (mask,) = ctx.saved_tensors
    wanted_x, _, wanted_source, _ = ctx.needs_input_grad
    return (
        grad.masked_fill(mask[..., None], 0) if wanted_x else None,
        None,
        ops.rows_at(grad, mask, ctx.rows) if wanted_source else None,
        None,
    )


torch.library.register_autograd("qlora_fx::masked_rows", _backward, setup_context=_context)
