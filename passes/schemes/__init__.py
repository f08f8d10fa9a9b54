"""From storage to weight, as nodes; the bytes are runtime/schemes'.

emission  what every scheme's twin can do, and what loss_head reads of a weight
four_bit  the twin of runtime/schemes/four_bit.py
"""

from __future__ import annotations

from collections.abc import Callable

from ...config import Quantization
from .emission import Emission, Storage, storage_of, stored_parts, weight_node
from .four_bit import FourBitEmission

__all__ = [
    "EMISSIONS",
    "Emission",
    "Storage",
    "emission_of",
    "storage_of",
    "stored_parts",
    "weight_node",
]

EMISSIONS: dict[str, Callable[[Quantization], Emission]] = {
    "nf4": FourBitEmission,
    "fp4": FourBitEmission,
}
"""By ``Quantization.quant_type``; runtime/schemes has the same keys."""


def emission_of(quantization: Quantization) -> Emission:
    """The nodes for weights that ``runtime.schemes.scheme_of(quantization)`` stored."""
    return EMISSIONS[quantization.quant_type](quantization)
