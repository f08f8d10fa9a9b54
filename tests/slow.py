"""What ``make test`` leaves to ``make test-all``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def only_slow_but(some: Iterable[Any], every: Iterable[Any]) -> list[Any]:
    """Parameters ``every``; those that are not in ``some`` run in ``make test-all`` alone."""
    kept = tuple(some)
    return [v if v in kept else pytest.param(*several(v), marks=pytest.mark.slow) for v in every]


def several(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
