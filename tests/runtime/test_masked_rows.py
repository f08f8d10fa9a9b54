"""Rows in the places that a mask marks, beside ``masked_scatter`` and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_fx.errors import InputError
from qlora_fx.runtime.masked_rows import masked_rows, rows_at
from torch import Tensor

PLACES = {
    "some": [[0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0]],
    "first and last": [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]],
    "none": [[0] * 4] * 3,
    "all": [[1] * 4] * 3,
}


def tensors(places: str, spare: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor(PLACES[places], dtype=torch.bool)
    x = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    rows = int(mask.sum()) + spare
    source = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), mask, source.requires_grad_()


@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("places", PLACES)
def test_values_and_gradients(places: str, spare: int) -> None:
    x, mask, source = tensors(places, spare)
    true_x, true_source = (t.detach().clone().requires_grad_() for t in (x, source))
    expected = true_x.masked_scatter(mask[..., None], true_source)
    found = masked_rows(x, mask, source, False)
    assert torch.equal(found, expected)
    grad = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine = torch.autograd.grad(found, (x, source), grad)
    for g, t in zip(mine, torch.autograd.grad(expected, (true_x, true_source), grad), strict=True):
        assert torch.equal(g, t)


def test_places_without_a_row_are_refused() -> None:
    x, mask, source = tensors("some", 0)
    with pytest.raises(InputError, match=f"has {len(source)} placeholders for the 3 features"):
        masked_rows(x.detach(), mask, source.detach()[:3], False)


@pytest.mark.parametrize("spare", [-1, 1])
def test_rows_must_be_as_many_as_places_where_that_is_asked_for(spare: int) -> None:
    """A text cut short has lost placeholders: features of one picture would go to the next."""
    x, mask, source = (t.detach() for t in tensors("some", 1))
    places = len(source) - 1
    masked_rows(x, mask, source[:places], True)
    with pytest.raises(InputError, match=f"has {places} placeholders for the {places + spare} "):
        masked_rows(x, mask, source[: places + spare], True)


def test_the_operators_pass_opcheck() -> None:
    x, mask, source = tensors("some", 1)
    given: Any = (x, mask, source, False)
    torch.library.opcheck(masked_rows, given)
    torch.library.opcheck(rows_at, (x.detach(), mask, 5))
