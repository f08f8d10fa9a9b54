"""transformers' ``generate`` over another forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .errors import InputError


def with_forward(
    model: Any, run: Callable[..., Any], *, device: torch.device, dtype: torch.dtype
) -> Any:
    """An object of the model's own class whose forward is ``run``, so that all of transformers' generation applies.

    Args:
        model: without weights.
        device, dtype: what it says of itself.

    Raises:
        InputError: the model has no ``generate``.
    """
    if not hasattr(model, "generate"):
        raise InputError(f"{type(model).__name__} has no generate")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    # generate looks at the signature to see which arguments the model takes.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    members = {
        "forward": forward,
        "device": property(lambda _: device),
        "dtype": property(lambda _: dtype),
    }
    generator = copy.copy(model)
    generator.__class__ = type(type(model).__name__, (type(model),), members)
    return generator
