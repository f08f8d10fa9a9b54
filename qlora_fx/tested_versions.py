"""The releases whose private names qlora_fx is known to fit (``transformers_internals.py``)."""

from __future__ import annotations

import re
import warnings
from importlib.metadata import version

TESTED = {"transformers": ("5.17", "5.23"), "peft": ("0.21", "0.21")}
"""Oldest and newest minor release that the tests were run with."""


def warn_if_untested() -> None:
    """Say so if a library is newer than the tests know; what then fails may be its new names."""
    for library, (oldest, newest) in TESTED.items():
        installed = version(library)
        if minor(installed) > minor(newest):
            tested = oldest if oldest == newest else f"{oldest} to {newest}"
            warnings.warn(
                f"qlora_fx is tested with {library} {tested}; {installed} is installed and may not work",
                stacklevel=2,
            )


def minor(release: str) -> tuple[int, ...]:
    """``(5, 23)`` of "5.23.1" and of "5.23.0.dev0"."""
    return tuple(int(number) for number in re.findall(r"\d+", release)[:2])
