"""Recurrences of transformers' models as one operator: the model's own function inside, values and gradients its own."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from qlora_fx.runtime.recurrence import LIKE, PAIRS, as_operator, recurrence, recurrence_backward
from qlora_fx.tested_versions import minor


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decays(*shape: int) -> torch.Tensor:
    return -random(*shape, seed=3).abs()


def delta(heads: int) -> dict[str, Any]:
    """Of the gated delta rule, four value heads, one chunk and a part of the next."""
    return {
        "query": random(2, 70, heads, 8),
        "key": random(2, 70, heads, 8, seed=1),
        "value": random(2, 70, 4, 6, seed=2),
        "g": decays(2, 70, 4),
        "beta": random(2, 70, 4, seed=4).sigmoid(),
        "use_qk_l2norm_in_kernel": True,
    }


# Since then the function itself repeats the keys of grouped heads.
GROUPED = minor(version("transformers")) >= (5, 23)
SCAN = {
    "hidden_states": random(2, 13, 6, 4),
    "dt": random(2, 13, 6, seed=1),
    "A": decays(6),
    "B": random(2, 13, 2, 5, seed=2),
    "C": random(2, 13, 2, 5, seed=3),
    "chunk_size": 8,
    "D": random(6, seed=4),
    "dt_bias": random(6, seed=5),
    "dt_softplus": True,
    "z": None,
}
SELECTIVE = {
    "hidden_states": random(2, 6, 13),
    "dt": random(2, 6, 13, seed=1),
    "A": decays(6, 4),
    "B": random(2, 4, 13, seed=2),
    "C": random(2, 4, 13, seed=3),
    "D": random(6, seed=4),
    "z": random(2, 6, 13, seed=5),
    "delta_softplus": True,
}
WKV = {
    "time_decay": random(6),
    "time_first": random(6, seed=1),
    "key": random(2, 13, 6, seed=2),
    "value": random(2, 13, 6, seed=3),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "torch_chunk_gated_delta_rule": ("qwen3_5", delta(2 if GROUPED else 4)),
    "chunk_kimi_delta_attention": ("kimi_linear", delta(4) | {"g": decays(2, 70, 4, 8)}),
    "mamba2_chunk_scan": ("mamba2", SCAN),
    "mamba_selective_scan": ("mamba", SELECTIVE),
    "rwkv_linear_attention": ("rwkv", WKV),
}


def function(name: str) -> tuple[Callable[..., Any], str]:
    module = f"transformers.models.{CASES[name][0]}.modeling_{CASES[name][0]}"
    return getattr(importlib.import_module(module), name), module


def with_gradients(run: Callable[..., Any], given: dict[str, Any]) -> list[torch.Tensor]:
    inputs = {
        k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v
        for k, v in given.items()
    }
    result = run(**inputs)
    out = result[0] if isinstance(result, tuple) else result
    tensors = [v for v in inputs.values() if isinstance(v, torch.Tensor)]
    weights = random(*out.shape, seed=9).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def test_every_recurrence_has_a_case() -> None:
    assert CASES.keys() == LIKE.keys() >= PAIRS


@pytest.mark.parametrize("name", CASES)
def test_the_operator_gives_the_functions_values_and_gradients(name: str) -> None:
    own, module = function(name)
    theirs = with_gradients(own, CASES[name][1])
    mine = with_gradients(as_operator(own, module), CASES[name][1])
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_operators_pass_opcheck(name: str) -> None:
    _, module = function(name)
    given = {k: v for k, v in CASES[name][1].items() if v is not None}
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in given.items() if k not in tensors}
    options = json.dumps({"names": list(tensors), "given": rest})
    like = list(tensors).index(LIKE[name])
    inputs = [t.clone().requires_grad_() for t in tensors.values()]
    arguments = (inputs, f"{module}:{name}", options, like, torch.float32)
    torch.library.opcheck(recurrence, arguments)
    grad = torch.randn_like(recurrence(*arguments).detach())
    plain = [t.detach() for t in inputs]
    torch.library.opcheck(recurrence_backward, (grad, plain, *arguments[1:3], [0, 2]))


def test_a_state_that_goes_in_or_is_asked_for_is_the_functions_own_business() -> None:
    own, module = function("torch_chunk_gated_delta_rule")
    given = CASES["torch_chunk_gated_delta_rule"][1]
    stand_in = as_operator(own, module)
    with torch.no_grad():
        out, state = stand_in(**given, output_final_state=True)
        assert state.shape == (2, 4, 8, 6)
        again, _ = stand_in(**given, initial_state=state)
        true, _ = own(**given, initial_state=state)
    torch.testing.assert_close(again, true)
    assert not torch.equal(again, out)
    assert inspect.signature(stand_in) == inspect.signature(own)
