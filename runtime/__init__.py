"""What a finished graph calls when it runs. Knows nothing of torch.fx."""

from . import attention, convolution, loss, ops, recurrence

__all__ = [
    "attention",
    "convolution",
    "loss",
    "ops",
    "recurrence",
]  # importing them registers the operators
