"""Every error qlora_fx raises on purpose. A leaf: imports nothing of the project."""

from __future__ import annotations


class QLoRAError(Exception):
    """Base of all errors raised by qlora_fx."""


class ConfigError(QLoRAError, ValueError):
    """The user's configuration or arguments cannot be honoured; the message says what is accepted."""


class ModelError(QLoRAError, ValueError):
    """The model cannot be used so: transformed as it is (already quantized, on meta, NaN in a weight), or copied."""


class CaptureError(QLoRAError, ValueError):
    """``torch.export`` could not capture the model; the message names the line that stopped it."""


class InputError(QLoRAError, ValueError):
    """A call's tensors do not fit the model (shape, dtype, device) or an argument is unknown."""


class AdapterError(QLoRAError, ValueError):
    """An adapter folder or state dict does not fit; the current adapter is left as it was."""


class DataError(QLoRAError, ValueError):
    """A data file, download or checkpoint is missing, truncated or not what it should be."""


class CheckpointError(QLoRAError, ValueError):
    """A checkpoint is incomplete, damaged or in another format, or its folder cannot be written.

    The message names the tensor and the file. Nothing was changed.
    """


class GraphError(QLoRAError, RuntimeError):
    """A pass broke an invariant. This is a defect of qlora_fx: please report it with the message."""
