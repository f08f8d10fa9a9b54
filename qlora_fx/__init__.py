"""QLoRA as a compiler pass: capture, rewrite to NF4 + LoRA, compile, train. See ``transform``."""

import logging

# On some CPUs bitsandbytes advises to install a kernel for its fused 4-bit product, which no graph here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in str(record.msg)
)

from .tested_versions import warn_if_untested  # noqa: E402

warn_if_untested()  # before what may fail because of it

from . import testing  # noqa: E402
from .errors import (  # noqa: E402
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
from .explain import Explanation, Row  # noqa: E402
from .from_pretrained import from_pretrained  # noqa: E402
from .memory.plan import plan  # noqa: E402
from .memory.report import Plan  # noqa: E402
from .memory.saved_activations import Activations  # noqa: E402
from .merging.merge import MergeReport  # noqa: E402
from .model import QLoRAModel  # noqa: E402
from .transform import graph_text, transform  # noqa: E402

__version__ = "0.1.0"


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
