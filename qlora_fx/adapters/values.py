"""What is done with an adapter's values outside of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from ..passes.graph.site import Site
from ..weights.base import Base


class AdapterValues(Protocol):
    """The values of one kind of adapter; passes/adapters says which tensors it has."""

    def initialize(self, base: Base, site: Site) -> dict[str, torch.Tensor]:
        """New float32 tensors on the base's device, by role; the base's weights are in its store."""
        ...

    def merged(
        self, rows: Iterator[torch.Tensor], base: Base, site: Site, expert: int | None
    ) -> Iterator[torch.Tensor]:
        """The weight with the adapter in it, some rows after the other; they are changed in place.

        By rows, so that no second dense weight is held.

        Args:
            rows: all rows of ``[out, in]`` as it multiplies, float32, in order.
            expert: which matrix of a stack it is; None for an ordinary weight.
        """
        ...
