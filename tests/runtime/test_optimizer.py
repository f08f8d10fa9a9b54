"""The paged optimizers: by name, groups, weight decay, the one warning on a CPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from qlora_fx.runtime import optimizer as ours
from qlora_fx.runtime.optimizer import PAGED, paged_optimizer
from torch import nn


@pytest.mark.parametrize("name", PAGED)
def test_every_named_optimizer_lowers_a_quadratic(name: str) -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(128, 64))
    optimizer = paged_optimizer([p], name, lr=1e-2, weight_decay=0.0)
    before = float(p.detach().pow(2).sum())
    for _ in range(5):
        optimizer.zero_grad()
        p.pow(2).sum().backward()
        optimizer.step()
    assert float(p.detach().pow(2).sum()) < before


def test_adamw_equals_pytorch() -> None:
    torch.manual_seed(0)
    start = torch.randn(40, 30)
    a, b = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = paged_optimizer([a], "PagedAdamW32bit", lr=1e-2, weight_decay=0.1)
    plain = torch.optim.AdamW([b], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        for p, o in ((a, mine), (b, plain)):
            o.zero_grad()
            (p.sin() * p).sum().backward()
            o.step()
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_groups_keep_their_own_settings() -> None:
    a, b = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    optimizer = paged_optimizer(
        [{"params": [a], "lr": 0.5}, {"params": [b], "weight_decay": 0.3}],
        "PagedAdamW",
        lr=0.1,
        weight_decay=0.0,
    )
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.0),
        (0.1, 0.3),
    ]


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'AdamW'; accepted: PagedAdamW32bit, PagedAdamW8bit"):
        paged_optimizer([nn.Parameter(torch.ones(1))], "AdamW", lr=1.0, weight_decay=0.0)


def test_missing_paging_on_a_cpu_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            p = nn.Parameter(torch.ones(4, 4))
            optimizer = paged_optimizer([p], "PagedAdamW32bit", lr=0.1, weight_decay=0.0)
            p.sum().backward()
            optimizer.step()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1, messages
    assert "does not page optimizer state" in messages[0]
