"""transformers' ``generate`` over a transformed model."""

from __future__ import annotations

import copy
import inspect
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from .model import QLoRAModel


def stand_in(ours: QLoRAModel) -> Any:
    """The model's own class with our forward, so that all of transformers' generation applies."""
    model = ours._blueprint.model
    if not hasattr(model, "generate"):
        raise InputError(f"{type(model).__name__} has no generate")

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    # generate looks at the signature to see which arguments the model takes.
    forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    members = {
        "forward": forward,
        "device": property(lambda _: ours.device),
        "dtype": property(lambda _: ours.dtype),
    }
    twin = copy.copy(model)
    twin.__class__ = type(type(model).__name__, (type(model),), members)
    return twin
