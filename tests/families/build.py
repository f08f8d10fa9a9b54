"""What a family is, and how its model is built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

Tensors = dict[str, torch.Tensor]
Settings = dict[str, Any]
Batch = Callable[[int, int], Tensors]


@dataclass(frozen=True)
class Family:
    """A tiny model of one type.

    Attributes:
        model_type: transformers' name of the type, unique in ``FAMILIES``.
        kind: what the model does, for example ``"causal"`` or ``"vision"``.
        model: class name in ``transformers``.
        config: settings of its config class.
        batch: from ``(rows, tokens)``, tokens 12 to 60, to arguments of ``forward``; the same each time.
    """

    model_type: str
    kind: str
    model: str
    config: Settings
    batch: Batch


def build(family: Family) -> PreTrainedModel:
    """The family's model with seeded weights; transformers itself picks sdpa where it is supported."""
    torch.manual_seed(0)
    settings = copy.deepcopy(family.config)  # configs write into nested dictionaries
    config = transformers.AutoConfig.for_model(family.model_type, **settings)
    model: PreTrainedModel = getattr(transformers, family.model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or not parameter.any():
                nn.init.normal_(parameter, std=0.1)  # zeros would hide a lost bias, a shut gate
    return model


def like(kind: str, base: Settings, batch: Batch) -> Callable[..., Family]:
    """Makes families of one kind from ``(model_type, model, **changes to the settings)``."""
    return lambda model_type, model, **changes: Family(
        model_type, kind, model, base | changes, batch
    )


def composite(model_type: str, model: str, batch: Batch, **config: Any) -> Family:
    """A family whose config nests those of its parts."""
    return Family(model_type, "vision-language", model, config, batch)
