"""The convolution operator: checks, values and input gradients beside PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_fx.runtime.convolution import convolution, convolution_backward

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "depthwise": ((2, 6, 9), (6, 1, 4), {"padding": 3, "groups": 6}),
    "strided": ((2, 6, 11), (8, 3, 3), {"stride": 2, "groups": 2}),
    "dilated": ((2, 4, 11), (5, 4, 3), {"dilation": 2, "padding": 1}),
    "image": ((2, 3, 9, 7), (4, 3, 3, 2), {"stride": 2, "padding": 1}),
    "video": ((1, 2, 5, 4, 3), (3, 2, 2, 2, 2), {}),
}


def arguments(case: str, bias: bool) -> tuple[Any, ...]:
    shape, window, options = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in (shape, window))
    added = torch.randn(window[0], generator=generator) if bias else None
    sizes = len(shape) - 2
    listed = [
        [options.get(name, default)] * sizes
        for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))
    ]
    return x.requires_grad_(), weight, added, *listed, options.get("groups", 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_pytorchs(case: str, bias: bool) -> None:
    x, weight, added, *options = arguments(case, bias)
    mine = convolution(x, weight, added, *options)
    stride, padding, dilation, groups = options
    theirs = torch.ops.aten.convolution(
        x, weight, added, stride, padding, dilation, False, [0] * len(stride), groups
    )
    torch.testing.assert_close(mine, theirs)
    assert mine.is_contiguous()
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    (dx,) = torch.autograd.grad((mine * weights).sum(), x)
    (true,) = torch.autograd.grad((theirs * weights).sum(), x)
    torch.testing.assert_close(dx, true)


@pytest.mark.parametrize("case", ["image", "video"])
def test_channels_can_be_last(case: str) -> None:
    given = arguments(case, True)
    last = torch.channels_last if case == "image" else torch.channels_last_3d
    found = convolution(*given, channels_last=True)
    assert found.is_contiguous(memory_format=last)
    assert not found.is_contiguous()
    torch.testing.assert_close(found, convolution(*given))
    torch.library.opcheck(convolution, (*given, True))
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    gradients = [
        torch.autograd.grad((convolution(*given, channels_last=flag) * weights).sum(), given[0])
        for flag in (True, False)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", CASES)
def test_operators_pass_opcheck(case: str) -> None:
    given = arguments(case, True)
    torch.library.opcheck(convolution, given)
    x, weight, _, *options = given
    grad = torch.randn_like(convolution(*given).detach())
    torch.library.opcheck(convolution_backward, (grad, weight, list(x.shape), *options))
