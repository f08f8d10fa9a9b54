"""bitsandbytes' paged optimizers over the adapter parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch

PAGED = (
    "PagedAdamW32bit",
    "PagedAdamW8bit",
    "PagedAdamW",
    "PagedAdam32bit",
    "PagedAdam8bit",
    "PagedAdam",
    "PagedLion32bit",
    "PagedLion8bit",
    "PagedLion",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
)
_warned: set[str] = set()


def paged_optimizer(
    params: Iterable[Any], name: str, *, lr: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """Construct ``bitsandbytes.optim.<name>``.

    On CUDA its state lives in managed memory, which the driver evicts to the host under pressure. On a CPU
    bitsandbytes has no paging: the state is ordinary memory, and this is said once.

    Args:
        params: parameters or group dicts as for any ``torch.optim`` optimizer.
        name: one of ``PAGED``.
        lr: learning rate.
        weight_decay: decoupled weight decay of the groups that give none.
        options: passed on (``betas``, ``eps``, ...).

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PAGED or not hasattr(bnb.optim, name):
        raise ValueError(f"optimizer {name!r}; accepted: {', '.join(PAGED)}")
    kind = getattr(bnb.optim, name)
    options = {"lr": lr, "weight_decay": weight_decay, **options}
    optimizer: Any = kind(list(params), **options)
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p.device.type == "cpu" for p in tensors):
        optimizer._cpu_paged_warned = (
            True  # bitsandbytes' own warning; ours says it at the right place
        )
        if "cpu" not in _warned:
            _warned.add("cpu")
            warnings.warn(
                f"{name} on a CPU: bitsandbytes does not page optimizer state there, it is held in "
                "ordinary memory. Training is the same.",
                stacklevel=5,
            )
    return optimizer  # type: ignore[no-any-return]
