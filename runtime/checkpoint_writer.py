"""Write a checkpoint folder: whole or not at all.

Everything is written to a folder beside the destination, each file synced to the disk, and then the two change
places in one step (Linux: ``renameat2`` with ``RENAME_EXCHANGE``; a destination that does not exist yet: ``rename``). So
a kill at any byte, or a full disk, leaves the old folder or the new one under the name. Where the
system cannot exchange (other systems, some network file systems), the old folder is renamed away first: a kill
between these two renames leaves it as ``.<name>.old``, and the next writer to the same place puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import CheckpointError
from .safetensors_reader import CODES

EXCHANGE, HERE = 2, -100
"""``RENAME_EXCHANGE`` and ``AT_FDCWD`` of linux/fs.h and fcntl.h."""
WRITE = 16 << 20
"""Bytes that are copied from a device at a time."""
STALE = re.compile(
    r"(model|quantized|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
)
"""Weights of a checkpoint that is written over; other files of the folder stay."""


@dataclass(frozen=True)
class Spec:
    """A tensor that will be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class FolderWriter:
    """A folder in the making.

    Args:
        destination: where it will be.
        keep: files that are there and belong to no checkpoint's weights stay; otherwise nothing does.

    A context manager: leaving it without an error puts the folder in its place; with one, removes it.

    Raises:
        CheckpointError: the destination is a file, or writing failed; what was there is as it was.
    """

    def __init__(self, destination: str | os.PathLike[str], *, keep: bool = True) -> None:
        self.keep = keep
        self.destination = Path(destination).expanduser().resolve()
        if self.destination.exists() and not self.destination.is_dir():
            raise CheckpointError(
                f"{os.fspath(destination)!r} is a file; accepted: a folder, or a new name"
            )
        name = self.destination.name
        self.scratch = scratch_of(self.destination)
        self.old = self.destination.with_name(f".{name}.old")
        self.open: dict[str, int] = {}
        self.places: dict[str, tuple[str, int, Spec]] = {}
        self.written: set[str] = set()

    def __enter__(self) -> FolderWriter:
        with self.reporting("made"):
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            if (
                self.old.is_dir()
            ):  # a writer was killed between two renames, or before it had cleaned up
                if self.destination.exists():
                    shutil.rmtree(self.old)
                else:
                    os.rename(self.old, self.destination)
            remove_litter(self.destination)
            os.mkdir(self.scratch)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                with self.reporting("finished"):
                    self.finish()
        finally:
            for descriptor in self.open.values():
                os.close(descriptor)
            self.open.clear()
            shutil.rmtree(self.scratch, ignore_errors=True)

    @contextlib.contextmanager
    def reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.destination} cannot be {what}: {error}. What was there before is as it was"
            ) from error

    # -- files ----------------------------------------------------------------------------------------

    def text(self, name: str, text: str) -> None:
        """Write a small file."""
        with self.reporting("written"), open(self.scratch / name, "w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())

    def copy(self, file: Path) -> None:
        """Copy a file as it is."""
        with self.reporting("written"):
            shutil.copyfile(file, self.scratch / file.name)
            sync(self.scratch / file.name)

    def tensors(
        self, specs: Iterable[Spec], *, single: str = "model.safetensors", max_shard_size: int
    ) -> None:
        """Say which tensors will come; lay out the shards and write their headers.

        Files and index are huggingface_hub's, as in ``save_pretrained``: a file holds at most ``max_shard_size``
        bytes of tensors, or one larger tensor; of several files there is an index.
        """
        announced = {spec.name: spec for spec in specs}
        split = split_state_dict_into_shards_factory(
            announced,
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern=single.removesuffix(".safetensors") + "{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        for file, names in split.filename_to_tensors.items():
            with self.reporting("written"):
                self.begin(file, [announced[name] for name in names])
        if split.is_sharded:
            weight_map = dict(sorted(split.tensor_to_filename.items()))
            index = {"metadata": split.metadata, "weight_map": weight_map}
            self.text(f"{single}.index.json", json.dumps(index, indent=2) + "\n")

    def begin(self, name: str, shard: list[Spec]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # Wide elements first, as the safetensors library does: then all are aligned.
        for spec in sorted(shard, key=lambda s: (-s.dtype.itemsize, s.name)):
            header[spec.name] = {
                "dtype": CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [at, at + spec.nbytes],
            }
            self.places[spec.name] = (name, at, spec)
            at += spec.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(self.scratch / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.open[name] = descriptor
        base = 8 + len(text)
        if hasattr(os, "posix_fallocate") and at:
            os.posix_fallocate(descriptor, 0, base + at)  # a full disk is noticed here
        write_all(descriptor, memoryview(len(text).to_bytes(8, "little") + text), 0)
        for spec in shard:
            file, start, _ = self.places[spec.name]
            self.places[spec.name] = (file, base + start, spec)

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the tensors, in any order."""
        file, start, spec = self.places[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; {spec.dtype} {list(spec.shape)} was announced"
            )
        flat = tensor.detach().reshape(-1)
        step = max(WRITE // spec.dtype.itemsize, 1)
        with self.reporting("written"):
            for at in range(0, flat.numel(), step):
                piece: Any = flat[at : at + step].cpu().contiguous().view(torch.uint8).numpy()
                write_all(self.open[file], memoryview(piece), start + at * spec.dtype.itemsize)
        self.written.add(name)

    # -- the last step ----------------------------------------------------------------------------------

    def finish(self) -> None:
        missing = sorted(self.places.keys() - self.written)
        if missing:
            raise ValueError(
                f"{missing[0]} and {len(missing) - 1} more were announced and not written"
            )
        for descriptor in self.open.values():
            os.fsync(descriptor)
        if self.destination.is_dir():
            if self.keep:
                self.keep_others()
            shutil.copymode(self.destination, self.scratch)
        sync(self.scratch)
        if not self.destination.is_dir():
            os.rename(self.scratch, self.destination)
            sync(self.destination.parent)
            return
        if exchange(self.scratch, self.destination):
            sync(self.destination.parent)
            return  # the old folder is removed under the scratch name
        os.rename(self.destination, self.old)
        os.rename(self.scratch, self.destination)
        sync(self.destination.parent)
        shutil.rmtree(self.old, ignore_errors=True)

    def keep_others(self) -> None:
        """Link what the old folder has besides a checkpoint's weights into the new one."""
        for item in self.destination.iterdir():
            new = self.scratch / item.name
            if new.exists() or STALE.fullmatch(item.name):
                continue
            if item.is_symlink():
                os.symlink(os.readlink(item), new)
            elif item.is_dir():
                shutil.copytree(item, new, symlinks=True, copy_function=link)
            else:
                link(item, new)


def link(old: Any, new: Any) -> None:
    """A second name of the same file, or a copy where there is no such thing."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copy2(old, new)


def write_all(descriptor: int, data: memoryview, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], at + done)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not sync folders
            raise
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step; False where the system cannot."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        renameat2 = libc.renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return bool(renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0)


def scratch_of(folder: Path) -> Path:
    """What this process calls a folder that is not whole."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.partial")


def remove_litter(folder: Path) -> None:
    """Remove what killed processes left of it in parts; its name may be a pattern."""
    for left in folder.parent.glob(f".{folder.name}.*.partial"):
        if not is_running(left.name.split(".")[-2]):
            shutil.rmtree(left, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove it whole: a process that is killed meanwhile leaves no part of it under its name."""
    scratch = scratch_of(folder)
    os.rename(folder, scratch)
    shutil.rmtree(scratch, ignore_errors=True)


def is_running(pid: str) -> bool:
    """True if a process of this number exists (here)."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
