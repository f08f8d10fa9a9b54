"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re
from typing import Any

from .errors import ConfigError

PREFIXES = "kmgt"
SIZES = "bytes as an int or as '6GB' or '500 MiB'"
"""What is accepted, for messages."""


def parse_size(size: Any, argument: str, *, accepted: str = SIZES) -> int:
    """Bytes of ``"6GB"``, ``"500 MiB"``, ``"1TB"`` or an int; ``KB`` is 1000 bytes, ``KiB`` 1024.

    Args:
        argument: the name of the argument, for the message.
        accepted: what the argument accepts, for the message.

    Raises:
        ConfigError: it is no size above 0.
    """
    found = 0
    if isinstance(size, int) and not isinstance(size, bool):
        found = size
    elif isinstance(size, str):
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([kmgt])(i?)b?\s*", size.lower())
        if match is not None:
            power = 1 + PREFIXES.index(match[2])
            found = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if found <= 0:
        raise ConfigError(f"{argument}={size!r}; accepted: {accepted}")
    return found
