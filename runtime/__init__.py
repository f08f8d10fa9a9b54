"""What a finished graph calls when it runs. Knows nothing of torch.fx."""

from . import attention, loss, ops

__all__ = ["attention", "loss", "ops"]  # importing them registers the operators
