"""bitsandbytes' paged optimizers over a model's adapters, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .runtime import optimizer as runtime


def adapter_optimizer(
    params: Iterable[Any], name: str, lr: float, weight_decay: float, options: dict[str, Any]
) -> torch.optim.Optimizer:
    """A paged optimizer over checked parameters or groups.

    Raises:
        ConfigError: an unknown optimizer.
    """
    try:
        return runtime.paged_optimizer(params, name, lr=lr, weight_decay=weight_decay, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_groups(params: Iterable[Any], adapters: Mapping[str, nn.Parameter]) -> list[Any]:
    """The user's parameters or group dicts, whose iterators are made lists.

    Raises:
        ConfigError: a parameter that is none of ``adapters``.
    """
    known = {id(p) for p in adapters.values()}
    groups = list(params)
    members: list[Any] = []
    for i, group in enumerate(groups):
        if isinstance(group, dict):
            several = group["params"]
            several = [several] if isinstance(several, torch.Tensor) else list(several)
            groups[i] = {**group, "params": several}
            members += several
        else:
            members.append(group)
    for p in members:
        if id(p) not in known:
            what = f"a tensor {list(p.shape)}" if isinstance(p, torch.Tensor) else repr(p)
            raise ConfigError(
                f"{what} is not an adapter parameter of this model; accepted: parameters from "
                "qmodel.adapter_parameters()"
            )
    return groups
