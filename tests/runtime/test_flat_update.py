"""Updates of many parameters as one: bitsandbytes' numbers and state for each, whoever made the optimizer."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from qlora_fx.runtime import flat_update
from qlora_fx.runtime.flat_update import update_together
from torch import nn

SHAPES = [(16, 48), (80, 16), (7,), (64, 96), (33, 5), (4, 16, 100), (128, 64)]
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "AdamW": (bnb.optim.AdamW, {"weight_decay": 0.1}),
    "paged AdamW": (bnb.optim.AdamW, {"is_paged": True}),
    "8-bit AdamW": (bnb.optim.AdamW, {"optim_bits": 8, "is_paged": True}),
    "Lion": (bnb.optim.Lion, {"weight_decay": 0.1}),
    "8-bit Lion": (bnb.optim.Lion, {"optim_bits": 8}),
    "AdEMAMix": (bnb.optim.AdEMAMix, {}),
    "8-bit AdEMAMix": (bnb.optim.AdEMAMix, {"optim_bits": 8}),
    "RMSprop": (bnb.optim.RMSprop, {}),
    "SGD": (bnb.optim.SGD, {"momentum": 0.9}),
}
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


def parameters(*, together: bool) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    if together:
        update_together(made)
    return made


def optimizer_of(params: list[nn.Parameter], kind: str, **changes: Any) -> Any:
    cls, options = KINDS[kind]
    groups = [{"params": params[:4]}, {"params": params[4:], "lr": 3e-3}]
    return cls(groups, **({"lr": 1e-2} | options | changes))


def take_steps(
    params: list[nn.Parameter], optimizer: Any, steps: range, without: int | None = None
) -> None:
    """Steps with gradients that depend on the step and on the values; ``without`` has none in step 2."""
    for i in steps:
        optimizer.zero_grad()
        loss = sum(((p * (j + 1)).sin() * (i + 1)).square().sum() for j, p in enumerate(params))
        loss.backward()
        if i == 2 and without is not None:
            params[without].grad = None
        optimizer.step()


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that bitsandbytes updated."""
    sizes: list[int] = []

    def counting(own: Any) -> Any:
        def counted(kind: str, g: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(g.numel())
            return own(kind, g, *args, **kwargs)

        return counted

    for name in ("optimizer_update_32bit", "optimizer_update_8bit_blockwise"):
        monkeypatch.setattr(bnb.functional, name, counting(getattr(bnb.functional, name)))
    return sizes


@pytest.mark.parametrize("without", [None, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_each_parameter_gets_the_same_bits_as_alone(kind: str, without: int | None) -> None:
    mine, alone = parameters(together=True), parameters(together=False)
    first, second = optimizer_of(mine, kind), optimizer_of(alone, kind)
    for params, optimizer in ((mine, first), (alone, second)):
        take_steps(params, optimizer, range(5), without)
    for a, b, start in zip(mine, alone, parameters(together=False), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, start)
    assert [g["params"] for g in first.param_groups] == [mine[:4], mine[4:]]
    if without is not None:  # they go one by one now, and kernels take memory as it lies
        group = mine[:4] if without < 4 else mine[4:]
        states = [t for p in group for t in first.state[p].values() if isinstance(t, torch.Tensor)]
        assert all(t.is_contiguous() for t in states)
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for i, state in theirs["state"].items():
        for (name, a), (other, b) in zip(_flat(ours["state"][i]), _flat(state), strict=True):
            assert name == other
            assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), (i, name)


def _flat(state: dict[str, Any]) -> list[tuple[str, Any]]:
    inner = {k: v for k, v in state.items() if not isinstance(v, dict)}
    for value in state.values():
        if isinstance(value, dict):
            inner |= value
    return sorted(inner.items())


def test_a_step_is_a_few_updates(updates: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(together=True)
    optimizer = optimizer_of(params, "AdamW")
    take_steps(params, optimizer, range(3))
    assert updates == [768 + 1280 + 256 + 6144, 256 + 6400 + 8192] * 3
    monkeypatch.setattr(flat_update, "LENGTH", 2000)
    updates.clear()
    take_steps(params, optimizer_of(params, "AdamW"), range(1))
    assert updates == [768 + 1280, 256 + 6144, 256 + 6400, 8192]


@pytest.mark.parametrize("kind", ["paged AdamW", "8-bit AdamW", "8-bit AdEMAMix"])
def test_state_goes_over_from_and_to_bitsandbytes_own(kind: str, updates: list[int]) -> None:
    mine, alone = parameters(together=True), parameters(together=False)
    first, second = optimizer_of(mine, kind), optimizer_of(alone, kind)
    take_steps(mine, first, range(3))
    take_steps(alone, second, range(3))
    first, second = (
        _loaded(optimizer_of(p, kind), copy.deepcopy(other.state_dict()))
        for p, other in ((mine, second), (alone, first))
    )
    updates.clear()
    take_steps(mine, first, range(3, 6))
    count = len(updates)
    take_steps(alone, second, range(3, 6))
    assert count < len(updates) - count, "those that were loaded go together again"
    for a, b in zip(mine, alone, strict=True):
        assert torch.equal(a, b)


def _loaded(optimizer: Any, state: Any) -> Any:
    optimizer.load_state_dict(state)
    return optimizer


def test_state_is_large_enough_to_be_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes pages what it allocates for 100,000 elements at least; also after a load."""
    asked: list[int] = []
    own = bnb.optim.AdamW.get_state_buffer

    def get_state_buffer(self: Any, p: Any, dtype: Any = torch.float32) -> Any:
        asked.append(p.numel())
        return own(self, p, dtype)

    monkeypatch.setattr(bnb.optim.AdamW, "get_state_buffer", get_state_buffer)
    params = [nn.Parameter(torch.randn(16, 4096)) for _ in range(4)]
    update_together(params)
    optimizer = bnb.optim.AdamW(params, is_paged=True)
    take_steps(params, optimizer, range(2))
    assert asked == [4 * 16 * 4096] * 2
    again = _loaded(bnb.optim.AdamW(params, is_paged=True), optimizer.state_dict())
    take_steps(params, again, range(2))
    assert asked == [4 * 16 * 4096] * 4
    buffers = {s["state1"].untyped_storage().data_ptr() for s in again.state.values()}
    assert len(buffers) == 1


def test_gradients_of_the_last_step_act_no_more() -> None:
    """The module's ``zero_grad`` and a clip between two steps, as ``Trainer`` does them."""
    mine, alone = parameters(together=True), parameters(together=False)
    for params in (mine, alone):
        module = nn.ParameterList(params)
        optimizer = optimizer_of(params, "AdamW")
        for i in range(4):
            loss = sum((p.sin() * (i + 1)).square().sum() for p in params)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
            module.zero_grad()
            assert all(p.grad is None for p in params)
    for a, b in zip(mine, alone, strict=True):
        assert torch.equal(a, b)


def test_gradients_stay_where_a_user_looks_for_them() -> None:
    params = parameters(together=True)
    optimizer = optimizer_of(params, "AdamW")
    sum(p.square().sum() for p in params).backward()
    before = [p.grad.clone() for p in params if p.grad is not None]
    optimizer.step()
    for p, grad in zip(params, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, grad)


def test_a_step_that_fails_leaves_the_groups_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(together=True)
    optimizer = optimizer_of(params, "AdamW")
    take_steps(params, optimizer, range(1))
    with monkeypatch.context() as patch:

        def fails(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("out of memory")

        patch.setattr(bnb.functional, "optimizer_update_32bit", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            take_steps(params, optimizer, range(1, 2))
    lengths = [len(g["params"]) for g in optimizer.state_dict()["param_groups"]]
    assert lengths == [4, 3]
    take_steps(params, optimizer, range(1, 3))


def test_and_so_does_the_step_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters(together=True)
    optimizer = optimizer_of(params, "AdamW")
    with monkeypatch.context() as patch:
        patch.setattr(bnb.functional, "optimizer_update_32bit", lambda *a, **k: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take_steps(params, optimizer, range(1))
    take_steps(params, optimizer, range(1))
    assert [g["params"] for g in optimizer.param_groups] == [params[:4], params[4:]]


@pytest.mark.parametrize("kind", ["LAMB", "a closure", "an override"])
def test_what_looks_at_whole_parameters_updates_them_one_by_one(
    kind: str, updates: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = parameters(together=True)
    if kind == "LAMB":
        optimizer: Any = bnb.optim.LAMB(params, lr=1e-3)
    else:
        optimizer = optimizer_of(params, "AdamW")
    if kind == "an override":
        manager = bnb.optim.GlobalOptimManager.get_instance()
        monkeypatch.setattr(manager, "pid2config", {id(p): {"lr": 0.1} for p in params})
    sum(p.square().sum() for p in params).backward()
    optimizer.step(*([lambda: 0.0] if kind == "a closure" else []))
    assert sorted(updates) == sorted(p.numel() for p in params)
