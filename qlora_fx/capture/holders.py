"""What the model's modules are to PEFT: what a graph no longer shows, and a saved adapter has to say."""

from __future__ import annotations

from torch import nn
from transformers import Conv1D


def holders(model: nn.Module) -> dict[str, str]:
    """What each module that holds a weight is to PEFT: ``linear``, ``conv`` or ``embedding``."""
    kinds = {
        "linear": (nn.Linear, Conv1D),
        "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        "embedding": (nn.Embedding,),
    }
    return {
        path: kind
        for path, module in model.named_modules(remove_duplicate=False)
        for kind, classes in kinds.items()
        if isinstance(module, classes)
    }


def transposed_stacks(model: nn.Module) -> frozenset[str]:
    """Modules whose expert weights are ``[experts, in, out]``, as transformers marks them for PEFT."""
    return frozenset(p for p, m in model.named_modules() if getattr(m, "is_transposed", False))
