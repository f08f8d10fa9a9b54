"""Safetensors files, read piece by piece and checked before a value is used.

Layout (https://huggingface.co/docs/safetensors, "Format"): 8 bytes with the length ``n`` of the header as a
little-endian integer, ``n`` bytes of JSON ``{name: {dtype, shape, data_offsets}}`` with an optional
``__metadata__`` of strings, then the values, row-major and little-endian, without gaps.

Values are read with ``preadv`` into memory of ours. A memory-mapped file would count as resident memory page
by page as it is read, which is what loading has to bound; the kernel's read-ahead is asked for instead.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library itself."""
PIECE = 1 << 20
"""Elements read at a time: whole blocks of every blocksize, 2 MB of bfloat16."""
READ_AHEAD = 64 << 20
"""Bytes that the kernel is asked to fetch ahead of what is read."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        name: its key in the file.
        file: where it is.
        dtype: of its elements.
        shape: its shape.
        start, stop: its bytes in the file.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        CheckpointError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error


def read_header(path: Path) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a file in the order in which they lie in it, and its metadata; no value is read.

    Raises:
        CheckpointError: naming the file, and the tensor where there is one: the file is truncated or longer
            than its header says, the header is no header, or tensors overlap or leave gaps.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            first = f.read(8)
            length = int.from_bytes(first, "little")
            if len(first) < 8 or length > min(LONGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path} has {size} bytes and says that its header has {length}; accepted: a whole "
                    "safetensors file. It is truncated, or no safetensors file"
                )
            header = json.loads(f.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(
            f"{path} has a header that is a {type(header).__name__}, not an object"
        )
    metadata = header.pop("__metadata__", None) or {}
    entries = sorted(
        (entry(path, 8 + length, name, fields) for name, fields in header.items()),
        key=lambda e: (e.start, e.stop),
    )
    at = 8 + length
    for e in entries:
        if e.start != at:
            fault = "overlaps the tensor before it" if e.start < at else "leaves a gap before it"
            raise CheckpointError(
                f"{e.name} in {path} {fault}: it starts at byte {e.start}, not {at}"
            )
        at = e.stop
        if at > size:
            raise CheckpointError(
                f"{path} is truncated: it has {size} bytes, and {e.name} {list(e.shape)} needs {at}"
            )
    if at != size:
        raise CheckpointError(f"{path} has {size} bytes, and its tensors end at {at}")
    return entries, metadata


def entry(path: Path, base: int, name: str, fields: Any) -> Entry:
    """One item of a header.

    Raises:
        CheckpointError: a field is missing or of the wrong kind, or shape and size disagree.
    """
    try:
        code, shape, (start, stop) = fields["dtype"], fields["shape"], fields["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("a size is not a number from 0 on")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} has no valid description of {name}: {error!r}") from None
    if code not in DTYPES:
        raise CheckpointError(f"{name} in {path} has dtype {code}; accepted: {', '.join(DTYPES)}")
    needed = math.prod(shape) * DTYPES[code].itemsize
    if stop - start != needed:
        raise CheckpointError(
            f"{name} in {path} has {stop - start} bytes; {code} {list(shape)} needs {needed}"
        )
    return Entry(name, path, DTYPES[code], tuple(shape), base + start, base + stop)


class Shards:
    """Tensors of several files by name.

    Args:
        entries: of all files.

    A context manager: it opens each file once and closes all.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)
        self.files: dict[Path, int] = {}
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files.clear()
        self.buffer = torch.empty(0, dtype=torch.uint8)

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, in memory of its own.

        Raises:
            CheckpointError: the file ended early or cannot be read.
        """
        e = self.entries[name]
        tensor = torch.empty(e.shape, dtype=e.dtype)
        self.fill(tensor, e, 0)
        return tensor

    def pieces(self, name: str, size: int = PIECE) -> Iterator[torch.Tensor]:
        """The tensor's elements in order, ``size`` at a time, flat, in a buffer that is used again.

        Raises:
            CheckpointError: the file ended early or cannot be read.
        """
        e = self.entries[name]
        total = math.prod(e.shape)
        if self.buffer.numel() < size * e.dtype.itemsize:
            self.buffer = torch.empty(size * e.dtype.itemsize, dtype=torch.uint8)
        for at in range(0, total, size):
            count = min(size, total - at)
            piece = self.buffer[: count * e.dtype.itemsize].view(e.dtype)
            self.fill(piece, e, at * e.dtype.itemsize)
            yield piece

    def fill(self, tensor: torch.Tensor, e: Entry, offset: int) -> None:
        """Read into a contiguous CPU tensor, from ``offset`` bytes into the entry on."""
        if tensor.numel() == 0:
            return
        array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        memory = memoryview(array)
        descriptor = self.descriptor(e.file)
        at = e.start + offset
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, at, READ_AHEAD, os.POSIX_FADV_WILLNEED)
        done = 0
        while done < len(memory):
            try:
                got = os.preadv(descriptor, [memory[done:]], at + done)
            except OSError as error:
                raise CheckpointError(f"{e.name} in {e.file} cannot be read: {error}") from error
            if got == 0:
                raise CheckpointError(
                    f"{e.file} ended within {e.name}: it changed while it was read"
                )
            done += got

    def descriptor(self, file: Path) -> int:
        if file not in self.files:
            try:
                self.files[file] = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise CheckpointError(f"{file} cannot be opened: {error}") from error
        return self.files[file]
