"""bitsandbytes' optimizers update adapter parameters by the million, not one by one.

A model has hundreds of small adapter matrices. One update each is a launch and a synchronization each, and
bitsandbytes pages only state of at least 100,000 elements, which a single matrix seldom has. Here the matrices of a
parameter group lie in a few long tensors (``Run``), of which they are views; for the time of a ``step`` the optimizer
sees those instead. Its parameter groups, its ``state_dict`` and its numbers stay what they are without: each
parameter has its own state, a view into the run's.

The optimizer may be made by anyone, a trainer for instance: PyTorch's hooks around ``step`` do it.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary

BLOCK = 256
"""Elements per scale of 8-bit state (bitsandbytes 0.50, ``Optimizer2State.init_state``); each parameter starts a block."""
LENGTH = 1 << 20
"""Elements after which a run ends: an update's temporaries fit a cache."""

_together: Any = WeakIdKeyDictionary()
_plans: weakref.WeakKeyDictionary[torch.optim.Optimizer, Plan] = weakref.WeakKeyDictionary()


def update_together(params: Iterable[nn.Parameter]) -> None:
    """From now on bitsandbytes' optimizers update these in runs, whoever makes them."""
    _hook()
    for p in params:
        _together[p] = True


@functools.cache
def _hook() -> None:
    """Once per process."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def padded(count: int) -> int:
    """Elements that a parameter of ``count`` takes in a run."""
    return -(-count // BLOCK) * BLOCK


class Run:
    """Parameters of one group as views of one tensor.

    Args:
        params: of one dtype and device.

    Attributes:
        flat: what the optimizer updates for them.
        state: of ``flat``, between steps.
        states: of each parameter: views into ``state``.
    """

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.starts: list[int] = []
        size = 0
        for p in params:
            self.starts.append(size)
            size += padded(p.numel())
        self.flat = nn.Parameter(params[0].new_zeros(size))
        self.state: dict[str, Any] = {}
        self.states: list[dict[str, Any]] = []

    def views(self, whole: torch.Tensor) -> Iterator[torch.Tensor]:
        """Each parameter's part of a tensor ``[..., elements]``, in the parameter's shape."""
        for p, start in zip(self.params, self.starts, strict=True):
            part = whole[..., start : start + p.numel()]
            yield part.view(*whole.shape[:-1], *p.shape)

    def parts(self, name: str, value: Any) -> Iterator[Any]:
        """Each parameter's part of a state; what is no tensor of this length is everybody's."""
        size = self.flat.numel()
        if not isinstance(value, torch.Tensor) or name.startswith("qmap"):
            yield from (value for _ in self.params)
        elif value.shape[-1] == size:
            yield from self.views(value)
        else:  # a scale per block
            for p, start in zip(self.params, self.starts, strict=True):
                first = start // BLOCK
                yield value[..., first : first + padded(p.numel()) // BLOCK]

    def fits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether one update is what an update of each would be: all have gradients and are equally far."""
        states = [optimizer.state.get(p) or {} for p in self.params]
        steps = {state.get("step") for state in states}
        kinds = {tuple(sorted(state)) for state in states}
        return len(steps) == len(kinds) == 1 and all(
            p.grad is not None and not p.grad.is_sparse for p in self.params
        )

    def gather(self, optimizer: Any, group: int, place: int) -> None:
        """Before a step: values, gradients and state as one; ``flat`` lies at ``place`` of the group."""
        pairs = zip(self.params, self.views(self.flat.data), strict=True)
        for p, view in pairs:
            if p.data_ptr() != view.data_ptr():
                view.copy_(p.data)
                p.data = view
        gradient = torch.zeros_like(self.flat)
        views = list(self.views(gradient))
        grads: list[Any] = [p.grad for p in self.params]
        torch._foreach_copy_(views, grads)
        for p, view in zip(self.params, views, strict=True):
            p.grad = view  # its former memory is free before the next run takes some
        self.flat.grad = gradient
        own = [optimizer.state.get(p) for p in self.params]
        if not own[0]:
            return  # the optimizer makes it
        if not self.states or any(a is not b for a, b in zip(own, self.states, strict=True)):
            self.state = self.collected(optimizer, group, place, own)
        optimizer.state[self.flat] = self.state

    def collected(self, optimizer: Any, group: int, place: int, own: list[Any]) -> dict[str, Any]:
        """State that was loaded, in memory as the optimizer makes it (paged, for instance)."""
        optimizer.init_state(optimizer.param_groups[group], self.flat, group, place)
        state: dict[str, Any] = optimizer.state.pop(self.flat)
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and not name.startswith("qmap"):
                for part, mine in zip(self.parts(name, value), own, strict=True):
                    part.copy_(mine[name])
            else:
                state[name] = own[0][name]
        self.share(optimizer, state)
        return state

    def share(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Give each parameter its part of ``state``."""
        self.state, self.states = state, [{} for _ in self.params]
        for name, value in state.items():
            for one, part in zip(self.states, self.parts(name, value), strict=True):
                one[name] = part
        for p, one in zip(self.params, self.states, strict=True):
            optimizer.state[p] = one

    def scatter(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step."""
        state: Any = optimizer.state.pop(self.flat, None)
        self.flat.grad = None
        if not state:
            return  # the step did not come to its end
        if not self.states or state is not self.state:
            self.share(optimizer, state)
        for one in self.states:
            one["step"] = state["step"]

    def apart(self, optimizer: torch.optim.Optimizer) -> None:
        """Let each be updated by itself: bitsandbytes reads state as contiguous memory."""
        for p in self.params:
            for name, value in (optimizer.state.get(p) or {}).items():
                if isinstance(value, torch.Tensor):
                    optimizer.state[p][name] = value.contiguous()
        self.state, self.states = {}, []


class Plan:
    """How the parameter groups of one optimizer are updated.

    Attributes:
        groups: its parameters, as its owner knows them.
        runs: of each group.
        swapped: the runs stand in the groups now.
    """

    def __init__(self, optimizer: Any) -> None:
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.runs = [list(_runs(optimizer, params)) for params in self.groups]
        self.swapped: list[Run] = []

    def holds(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the groups are still those."""
        return len(self.groups) == len(optimizer.param_groups) and all(
            len(known) == len(group["params"])
            and all(a is b for a, b in zip(known, group["params"], strict=True))
            for known, group in zip(self.groups, optimizer.param_groups, strict=True)
        )

    def swap(self, optimizer: torch.optim.Optimizer) -> None:
        for i, (group, runs) in enumerate(zip(optimizer.param_groups, self.runs, strict=True)):
            fit = [run for run in runs if run.fits(optimizer)]
            for run in runs:
                if run not in fit:
                    run.apart(optimizer)
            members = {id(p) for run in fit for p in run.params}
            rest = [p for p in self.groups[i] if id(p) not in members]
            group["params"] = [run.flat for run in fit] + rest
            self.swapped += fit
            for place, run in enumerate(fit):
                run.gather(optimizer, i, place)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the owner's parameters back."""
        if not self.swapped:
            return
        for run in self.swapped:
            run.scatter(optimizer)
        self.swapped = []
        for group, params in zip(optimizer.param_groups, self.groups, strict=True):
            group["params"] = params


def _runs(optimizer: Any, params: list[nn.Parameter]) -> Iterator[Run]:
    """The runs of a group: of at least two parameters, whose state bitsandbytes keeps in one way."""
    manager, args = optimizer.mng, optimizer.args
    alike: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = defaultdict(list)
    for p in params:
        small = args.optim_bits == 8 and p.numel() < args.min_8bit_size  # kept in 32 bits
        if p in _together and not small and id(p) not in manager.pid2config:
            alike[p.dtype, p.device].append(p)
    for several in alike.values():
        run: list[nn.Parameter] = []
        size = 0
        for p in several:
            run.append(p)
            size += padded(p.numel())
            if size >= LENGTH or p is several[-1]:
                if len(run) > 1:
                    yield Run(run)
                run, size = [], 0


def _by_element(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an update looks at each element (or block of 256) by itself, with the group's settings alone."""
    if not isinstance(optimizer, Optimizer8bit):
        return False
    return optimizer.args.max_unorm == 0 and not optimizer.mng.index2config


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    plan = _plans.get(optimizer)
    if plan is not None:
        plan.restore(optimizer)  # a step that raised left the runs
    closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
    if closure is not None or not _by_element(optimizer):
        return
    if plan is None or not plan.holds(optimizer):
        if plan is None:
            optimizer.register_state_dict_pre_hook(_restore)
        plan = _plans[optimizer] = Plan(optimizer)
    with torch.no_grad():
        plan.swap(optimizer)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _restore(optimizer)


def _restore(optimizer: torch.optim.Optimizer) -> None:
    if optimizer in _plans:
        _plans[optimizer].restore(optimizer)
