"""How weights are stored: bytes here, the nodes that read them in passes/schemes.

scheme     what every scheme can do
four_bit   bitsandbytes' NF4 and FP4
blocks     its codes, piece by piece
"""

from __future__ import annotations

from collections.abc import Callable

from ...config import Quantization
from .four_bit import FourBit
from .scheme import PACKED, Builder, Part, Scheme, part_key

__all__ = ["PACKED", "SCHEMES", "Builder", "Part", "Scheme", "part_key", "scheme_of"]

SCHEMES: dict[str, Callable[[Quantization], Scheme]] = {"nf4": FourBit, "fp4": FourBit}
"""By ``Quantization.quant_type``; passes/schemes has the same keys."""


def scheme_of(quantization: Quantization) -> Scheme:
    """How weights with these settings are stored; there is none for ``config.DENSE``."""
    return SCHEMES[quantization.quant_type](quantization)
