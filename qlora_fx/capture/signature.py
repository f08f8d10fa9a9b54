"""Which calls share a captured graph, and whether it has logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Signature(NamedTuple):
    """What makes two calls share a captured and compiled graph.

    Attributes:
        training: the mode.
        adapter: whether the adapter is in it.
        logits: whether the output has logits where it has a loss.
        arguments: names, ranks, dtypes and constant values.
    """

    training: bool
    adapter: bool
    logits: bool
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        mode = "train" if self.training else "eval"
        without = "" if self.adapter else ", no adapter"
        without += "" if self.logits else ", no logits"
        return f"{mode}{without}({', '.join(name for name, _ in self.arguments)})"


def skips_logits(training: bool, values: Mapping[str, Any]) -> bool:
    """Whether logits are left out unless asked for: they only feed the loss of a training step."""
    return training and values.get("labels") is not None


def graph_title(training: bool, values: Mapping[str, Any]) -> str:
    return f"{'train' if training else 'eval'}-{'-'.join(sorted(n for n, v in values.items() if isinstance(v, torch.Tensor)))}"
