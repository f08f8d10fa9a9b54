"""QLoRA as a compiler pass: capture, rewrite to NF4 + LoRA, compile, train. See ``transform``."""

from .entry import graph_text, transform
from .errors import (
    AdapterError,
    CaptureError,
    ConfigError,
    DataError,
    GraphError,
    InputError,
    ModelError,
    QLoRAError,
)
from .model import QLoRAModel
from .report import Explanation, Row

__version__ = "0.1.0"


def explain(model: QLoRAModel) -> Explanation:
    """A table of every linear: quantized or not, adapted or not, why, and its bytes before and after."""
    return model.explain()


__all__ = [
    "AdapterError",
    "CaptureError",
    "ConfigError",
    "DataError",
    "Explanation",
    "GraphError",
    "InputError",
    "ModelError",
    "QLoRAError",
    "QLoRAModel",
    "Row",
    "explain",
    "graph_text",
    "transform",
]
