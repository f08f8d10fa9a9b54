"""Masks of intervals as sequences: the same attention, by a stand-in for FlashAttention that knows only where sequences start."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qlora_fx.runtime.attention_kernels import cuda as kernels
from qlora_fx.runtime.attention_kernels.cuda import VarlenFlash
from qlora_fx.runtime.attention_kernels.kernel import ANY, CAUSAL, Inputs, Mask
from qlora_fx.runtime.attention_kernels.varlen import Varlen, sequences_of
from torch import Tensor

S = 24
AT = torch.arange(S)


def rows(*each: Tensor) -> Tensor:
    """``[batch, 1, S, S]``."""
    return torch.stack(each)[:, None]


def causal() -> Tensor:
    return AT[:, None] >= AT


def documents(*lengths: int) -> Tensor:
    """Which belong together."""
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return number[:, None] == number


def window(size: int) -> Tensor:
    return causal() & (AT[:, None] - size < AT)


def right(padded: int) -> Tensor:
    return (S - padded > AT).expand(S, S)


def left(padded: int) -> Tensor:
    return (padded <= AT).expand(S, S)


PACKED = (causal() & documents(5, 9, 10), causal() & documents(24), causal() & documents(1, 1, 22))
TAIL = causal() & documents(5, 9, 10) & right(10)  # the padding is a document that sees nothing
MASKS: dict[str, tuple[Tensor, Varlen]] = {
    "right": (
        rows(causal(), causal() & right(3), causal() & right(9)),
        Varlen(True, True, 8, 0),
    ),
    "left": (rows(causal(), causal() & left(3), causal() & left(9)), Varlen(True, False, 8, 0)),
    "both": (rows(causal() & left(3) & right(2), causal()), Varlen(True, True, 8, 0)),
    "packed": (rows(*PACKED), Varlen(True, False, 8, 0)),
    "packed and padded": (rows(TAIL, TAIL), Varlen(True, False, 8, 0)),
    "window": (rows(window(5), window(5)), Varlen(True, False, 2, 5)),
    "window, left": (rows(window(5), window(5) & left(7)), Varlen(True, False, 4, 5)),
    "window, packed": (rows(window(5) & documents(4, 20)), Varlen(True, False, 2, 5)),
    "pictures": (rows(documents(4, 8, 12), documents(20, 4)), Varlen(False, False, 8, 0)),
    "all": (rows(documents(24), right(3), right(23)), Varlen(False, True, 8, 0)),
    "nothing": (rows(causal() & left(24), causal()), Varlen(True, False, 4, 0)),
}
HIDDEN_KEY = causal() & (AT != 4)
OTHERS: dict[str, Tensor] = {
    "holes": rows(causal() & (AT % 3 != 1)),
    "a hidden key": rows(HIDDEN_KEY),
    "a query that does not see itself": rows(causal() & ~((AT == 7)[:, None] & (AT == 7))),
    "as many as an interval, and none": rows(
        causal() & ~((AT == 7)[:, None] & (AT == 7)) | (AT == 7)[:, None] & (AT == 9)
    ),
    "two kinds behind": rows(
        causal() & ((AT[:, None] < 16) | (torch.where(AT < 20, 12, 8)[:, None] > AT))
    ),
    "prefix": rows(causal() | (AT < 5)),
    "window, right": rows(window(5) & right(4)),
    "two windows": rows(window(5), window(6)),
    "ahead": rows(AT[:, None] < AT),
    "heads": rows(causal() & left(3)).expand(1, 2, S, S),
    "additive": rows(causal() & left(3)).float(),
    "not square": rows(causal() & left(3))[..., :-1, :],
    "short": rows(causal() & left(1))[..., :7, :7],
    "random": rows(torch.rand(S, S, generator=torch.Generator().manual_seed(0)) < 0.5),
}


def code_of(mask: Tensor) -> int:
    return sequences_of(mask)[0]


@pytest.mark.parametrize("name", MASKS)
def test_what_the_host_learns(name: str) -> None:
    mask, expected = MASKS[name]
    code = code_of(mask)
    assert Varlen.of(code) == expected
    assert code > CAUSAL.code


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_left_to_other_kernels(name: str) -> None:
    assert code_of(OTHERS[name]) == ANY


def test_a_causal_mask_is_told_as_such() -> None:
    assert code_of(rows(causal(), causal())) == CAUSAL.code
    assert Varlen.of(CAUSAL.code) is None
    assert Varlen.of(ANY) is None


def scores_of(q: Tensor, k: Tensor, scale: float, told: Any) -> tuple[Tensor, Tensor]:
    """Scores ``[heads, tokens, tokens]`` and what the kernel shows of them, from starts alone."""
    starts_q, starts_k, longest, _, is_causal, width = told
    assert starts_q.dtype == starts_k.dtype == torch.int32
    seen = torch.zeros(q.shape[0], q.shape[0], dtype=torch.bool)
    for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
        many, keys = int(b - a), int(d - c)
        assert 0 <= many <= longest
        assert 0 <= keys <= longest
        behind = torch.arange(many)[:, None] + keys - many - torch.arange(keys)  # both end together
        shown = torch.ones(many, keys, dtype=torch.bool)
        if is_causal:
            shown = behind >= 0
        if width is not None:
            shown &= behind <= width
        seen[a:b, c:d] = shown
    assert starts_q[-1] == starts_k[-1] == q.shape[0]
    repeated = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return scale * torch.einsum("qhd,khd->hqk", q, repeated), seen


def forward(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest: int, _: int,
    dropout: float, is_causal: bool, debug: bool, *, scale: float, window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    told = (starts_q, starts_k, longest, longest, is_causal, window_size_left)
    scores, seen = scores_of(q, k, scale, told)
    scores = scores.masked_fill(~seen, -torch.inf)
    p = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0)
    out = torch.einsum("hqk,khd->qhd", p, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    return out, scores.logsumexp(-1).masked_fill(~seen.any(-1), torch.inf), None  # type: ignore[return-value]


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts_q: Tensor,
    starts_k: Tensor, longest: int, _: int, dropout: float, is_causal: bool, seed: Any, offset: Any, *,
    scale: float, window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    told = (starts_q, starts_k, longest, longest, is_causal, window_size_left)
    scores, seen = scores_of(q, k, scale, told)
    p = (scores - lse[..., None]).exp().masked_fill(~seen, 0)
    group = q.shape[1] // k.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (k, v))
    dp = torch.einsum("qhd,khd->hqk", grad, values) - (grad * out).sum(-1).T[..., None]
    ds = scale * p * dp
    dk = torch.einsum("hqk,qhd->khd", ds, q).unflatten(1, (-1, group)).sum(2)
    dv = torch.einsum("hqk,qhd->khd", p, grad).unflatten(1, (-1, group)).sum(2)
    return torch.einsum("hqk,khd->qhd", ds, keys), dk, dv


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    made = SimpleNamespace(_flash_attention_forward=forward, _flash_attention_backward=backward)
    monkeypatch.setattr(kernels, "aten", made)
    monkeypatch.setattr(kernels, "flash_takes", lambda inputs: True)
    return forward


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("name", MASKS)
def test_the_same_attention_and_gradients(name: str) -> None:
    mask, _ = MASKS[name]
    batch = mask.shape[0]

    def given(seed: int, heads: int, size: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        # as a model makes them: [batch, sequence, heads, size], transposed
        made = torch.randn(batch, S, heads, size, generator=generator, dtype=torch.float64)
        return made.transpose(1, 2)

    q, k, v, grad = given(0, 6, 12), given(1, 2, 12), given(2, 2, 10), given(3, 6, 10)
    true = [t.clone().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(3, 1) for t in true[1:])
    scores = (0.3 * true[0] @ keys.mT).masked_fill(~mask, -torch.inf)
    expected = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0) @ values
    inputs = Inputs(q, k, v, Mask(mask, *sequences_of(mask)), 0.3)
    kernel = VarlenFlash()
    assert kernel.takes(inputs)
    out, lse = kernel.forward(inputs)
    torch.testing.assert_close(out, expected)
    assert lse.is_contiguous()
    sees = mask.any(-1).expand_as(lse)
    torch.testing.assert_close(lse[sees], scores.logsumexp(-1)[sees])
    assert not lse.isneginf().any(), "a kernel would divide by it"
    found = kernel.backward(inputs, out, lse, grad)
    for mine, wanted in zip(found, torch.autograd.grad(expected, true, grad), strict=True):
        assert mine.is_contiguous()
        torch.testing.assert_close(mine, wanted)


@pytest.mark.usefixtures("flash")
def test_what_it_does_not_take() -> None:
    mask, _ = MASKS["left"]
    q = torch.zeros(3, 2, S, 8)
    code, starts = sequences_of(mask)
    kernel = VarlenFlash()
    assert kernel.takes(Inputs(q, q, q, Mask(mask, code, starts), 1.0))
    assert not kernel.takes(Inputs(q, q, q, Mask(mask, code), 1.0))
    assert not kernel.takes(Inputs(q, q, q, Mask(mask, ANY, starts), 1.0))
    assert not kernel.takes(Inputs(q, q, q, Mask(None, CAUSAL.code, starts), 1.0))
    assert not kernel.takes(Inputs(q, q, q, Mask(mask[:1], code, starts), 1.0))


def test_very_many_short_sequences_are_left_to_other_kernels() -> None:
    for length, expected in ((8, False), (48, True)):
        at = torch.arange(100 * length)
        number = at // length
        mask = rows((at[:, None] >= at) & (number[:, None] == number))
        assert (Varlen.of(code_of(mask)) is not None) is expected


def test_sequences_are_rounded_up_so_that_few_shapes_are_recorded() -> None:
    codes = {code_of(rows(causal() & documents(*[1] * n, S - n))) for n in range(4, 8)}
    assert len(codes) == 1
