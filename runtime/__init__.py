"""What a finished graph calls when it runs. Knows nothing of torch.fx."""

from . import (
    attention,
    cached_attention,
    convolution,
    linear_4bit,
    linear_dense,
    loss,
    masked_rows,
    ops,
    recurrence,
    ring,
)

__all__ = [
    "attention",
    "cached_attention",
    "convolution",
    "linear_4bit",
    "linear_dense",
    "loss",
    "masked_rows",
    "ops",
    "recurrence",
    "ring",
]  # importing them registers the operators
