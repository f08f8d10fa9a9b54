"""What ``qlora_fx`` offers: its names, and where they are."""

from __future__ import annotations

from . import testing
from .errors import (
    AdapterError,
    CaptureError,
    CheckpointError,
    ConfigError,
    DataError,
    GraphError,
    InputError,
    ModelError,
    QLoRAError,
    TrainingError,
)
from .explain import Explanation, Row
from .from_pretrained import from_pretrained
from .memory.plan import plan
from .memory.report import Plan
from .memory.saved_activations import Activations
from .merging.merge import MergeReport
from .model import QLoRAModel
from .transform import graph_text, transform


def explain(model: QLoRAModel) -> Explanation:
    """A table of every linear: quantized or not, adapted or not, why, and its bytes before and after."""
    return model.explain()


def saved_activations(model: QLoRAModel, *, batch_size: int, sequence_length: int) -> Activations:
    """The tensors held from forward to backward, from the partitioned joint graph of each body.

    Args:
        model: with backend "inductor" or "aot_eager". The memory budget it has is honoured.
        batch_size, sequence_length: sizes to evaluate for; any, not only those that ran. A decoder's rows have the
            encoder's length.

    Raises:
        ModelError: with backend "eager", whose program is not partitioned.
    """
    return model.saved_activations(batch_size=batch_size, sequence_length=sequence_length)


__all__ = [
    "AdapterError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Explanation",
    "GraphError",
    "InputError",
    "MergeReport",
    "ModelError",
    "Plan",
    "QLoRAError",
    "QLoRAModel",
    "Row",
    "TrainingError",
    "explain",
    "from_pretrained",
    "graph_text",
    "plan",
    "saved_activations",
    "testing",
    "transform",
]
