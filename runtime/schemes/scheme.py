"""What a storage scheme is: a weight as parts, and back. passes/schemes has the nodes that read the parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

PACKED = "packed"
"""The part that every scheme has; it is held under the weight's own key, the others under ``<key>.<part>``."""


@dataclass(frozen=True)
class Part:
    """One tensor of a weight's storage.

    Attributes:
        shape: of a stack of experts with their number in front, unless ``shared``.
        dtype: as it is held.
        shared: one tensor serves all weights of a model, of every expert.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    shared: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def part_key(weight: str, name: str, part: Part) -> str:
    """Store key of a part of the weight with the key ``weight``."""
    if part.shared:
        return name
    return weight if name == PACKED else f"{weight}.{name}"


class Builder(Protocol):
    """Storage of one weight, filled matrix by matrix.

    Attributes:
        parts: whole when every matrix was added.
        matrices: how many there are.
        finite: False if a value was NaN or infinite.
    """

    parts: dict[str, torch.Tensor]
    matrices: int
    finite: bool

    def add(self, index: int, pieces: Iterable[torch.Tensor]) -> None:
        """Quantize matrix ``index`` from its elements in order, flat.

        Args:
            pieces: as ``Scheme.pieces`` or ``Scheme.rows`` cut them, or ``safetensors_reader.Shards.pieces``, which end
                where a block of any blocksize does, and so within a row.
        """


class Scheme(Protocol):
    """One way to store weights, with its settings. Shapes are ``[out, in]`` or ``[experts, out, in]``."""

    def describe(self) -> str:
        """The settings in words, for ``explain``."""
        ...

    def parts(self, shape: tuple[int, ...], *, name: str = "a weight") -> dict[str, Part]:
        """The parts of the weight ``name``, without any data; ``PACKED`` comes first.

        Raises:
            ConfigError: the settings do not fit the shape.
        """
        ...

    # -- to storage -----------------------------------------------------------------------------------

    def builder(self, shape: tuple[int, ...], device: torch.device | str) -> Builder:
        """Empty storage, to be filled."""
        ...

    def pieces(self, matrix: torch.Tensor) -> Iterator[torch.Tensor]:
        """The elements of ``[out, in]``, of any strides, row by row, in flat pieces for a builder."""
        ...

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts of a dense weight, on its device."""
        builder = self.builder(tuple(weight.shape), weight.device)
        for i in range(builder.matrices):
            builder.add(i, self.pieces(weight[i] if weight.dim() == 3 else weight))
        return builder.parts

    # -- from storage ---------------------------------------------------------------------------------

    def dequantize(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """The dense weight in ``dtype`` that the parts stand for."""
        ...

    def rows(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...]
    ) -> Iterator[torch.Tensor]:
        """``dequantize`` of ``[out, in]`` in float32, some rows after the other: those of ``row_ranges``."""
        ...

    def row_ranges(self, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Ranges of rows of ``[out, in]`` that can be dequantized, and quantized, by themselves."""
        ...

    def tables(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Constants that a graph reads where it looks up single rows of a stored weight, by store key."""
        ...

    # -- state dicts ----------------------------------------------------------------------------------

    def to_state(
        self, parts: Mapping[str, torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, torch.Tensor]:
        """What lies beside the packed weight in a state dict, by what follows ``<weight>.``.

        Args:
            dtype: of the dense weight.
        """
        ...

    def from_state(
        self,
        state: Mapping[str, torch.Tensor],
        parts: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> dict[str, torch.Tensor]:
        """New values of the weight's own parts but the packed one, from what ``to_state`` made.

        Args:
            parts: those that are held now.

        Raises:
            CheckpointError: it was made with other settings, or of another shape.
        """
        ...

    # -- stacks ---------------------------------------------------------------------------------------

    def matrix(self, parts: Mapping[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        """The parts of one matrix of a stack."""
        shared = self.shared()
        return {name: part if name in shared else part[index] for name, part in parts.items()}

    def stack(self, each: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The parts of a stack from those of its matrices."""
        shared = self.shared()
        return {
            name: first if name in shared else torch.stack([parts[name] for parts in each])
            for name, first in each[0].items()
        }

    def shared(self) -> frozenset[str]:
        """Names of the parts that all weights share."""
        return frozenset()
