"""Every error qlora_fx raises on purpose, and where its warnings point. A leaf: imports nothing of the project."""

from __future__ import annotations

import sys


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


class TrainingError(QLoRAError, RuntimeError):
    """A training run cannot go on: a loss or gradient that is not finite. The message says where it came from."""


class GraphError(QLoRAError, RuntimeError):
    """A pass broke an invariant. This is a defect of qlora_fx: please report it with the message."""


CALLED_THROUGH = ("qlora_fx", "torch", "peft", "contextlib")
"""Packages between a user's call and what warns: ours, and those whose modules and decorators call us."""


def users_stacklevel() -> int:
    """``stacklevel`` for a ``warnings.warn`` beside this call, so that it names the line of the user's call."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "torch").partition(".")[0] not in CALLED_THROUGH:
            break  # generated code has no name
        level, frame = level + 1, frame.f_back
    return level
