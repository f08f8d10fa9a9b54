"""bitsandbytes' paged optimizers over the adapter parameters."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn

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
)
_warned: set[str] = set()
ALIGNMENT = 16
"""Elements; each parameter starts at a whole vector of the flat buffer."""
PIECE = 1 << 20
"""Elements that one update takes at a time: its temporaries fit a cache, and paging starts at 100,000."""


class Flat:
    """Parameters as views of one buffer, and their gradients as views of another.

    An update, or gradient clipping, over ``pieces`` is a few calls instead of one per parameter; and
    bitsandbytes pages only tensors of at least 100,000 elements, which a single LoRA matrix seldom has.
    Autograd adds into the views, so the pieces' gradients are always the whole gradient.

    Attributes:
        pieces: the buffer in parts of ``PIECE`` elements, each with its ``grad``.
    """

    def __init__(self, params: Iterable[nn.Parameter]) -> None:
        self.params = list(params)
        places = []
        size = 0
        for p in self.params:
            places.append((size, p.numel(), p.shape))
            size += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        first = self.params[0]
        values = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.gradient = torch.zeros_like(values)
        self.pieces = [nn.Parameter(part) for part in torch.split(values, PIECE)]
        for piece, part in zip(self.pieces, torch.split(self.gradient, PIECE), strict=True):
            piece.grad = part
        self.grads = []
        for p, (start, count, shape) in zip(self.params, places, strict=True):
            view = values[start : start + count].view(shape)
            view.copy_(p.detach())
            p.data = view
            self.grads.append(self.gradient[start : start + count].view(shape))
        self.link()

    def link(self) -> None:
        """Let every parameter's gradient be its view again, with what was put in its place meanwhile."""
        for p, view in zip(self.params, self.grads, strict=True):
            if p.grad is None:
                view.zero_()
            elif p.grad.data_ptr() != view.data_ptr():
                view.copy_(p.grad)
            else:
                continue
            p.grad = view

    def optimizer(self, kind: type, **options: Any) -> torch.optim.Optimizer:
        """An optimizer of the class ``kind`` over the pieces, whose ``zero_grad`` keeps the views."""
        flat = self

        def step(self: Any, closure: Any = None) -> Any:
            flat.link()
            return kind.step(self, closure)  # type: ignore[attr-defined]

        def zero_grad(self: Any, set_to_none: bool = True) -> None:
            flat.gradient.zero_()
            for p, view in zip(flat.params, flat.grads, strict=True):
                p.grad = view

        made: Any = type(kind.__name__, (kind,), {"step": step, "zero_grad": zero_grad})
        return made(self.pieces, **options)  # type: ignore[no-any-return]


def paged_optimizer(
    params: Iterable[Any] | Flat, name: str, *, lr: float, weight_decay: float, **options: Any
) -> torch.optim.Optimizer:
    """Construct ``bitsandbytes.optim.<name>``.

    On CUDA its state lives in managed memory, which the driver evicts to the host under pressure. On a CPU
    bitsandbytes has no paging: the state is ordinary memory, and this is said once.

    Args:
        params: a ``Flat``; or parameters or group dicts as for any ``torch.optim`` optimizer.
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
    optimizer: Any
    if isinstance(params, Flat):
        optimizer = params.optimizer(kind, **options)
    else:
        optimizer = kind(list(params), **options)
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
