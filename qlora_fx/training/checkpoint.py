"""What a trainer's checkpoint is of, and whether it is whole: ``qlora_fx.json`` beside the trainer's files."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, users_stacklevel
from ..weights.base import Base

STAMP = "qlora_fx.json"
SAMPLE = 4096
"""Bytes of each end of a tensor that are read for the fingerprint of a base."""
VERSIONS = ("qlora_fx", "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate")


def base_fingerprint(base: Base) -> str:
    """A checksum over both ends of every frozen tensor; 4-bit weights by their packed bytes."""
    trained = {
        t.key for s in base.sites.values() if s.adapt for t in base.adapter.tensors(s).values()
    }
    found = 0
    for key, tensor in sorted(base.store.items()):
        if key in trained or key in base.trained:
            continue
        flat = tensor.detach().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
        ends = (flat[:SAMPLE], flat[-SAMPLE:])
        found = zlib.crc32(f"{key} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        for end in ends:
            found = zlib.crc32(end.cpu().contiguous().numpy().tobytes(), found)
    return f"{found:08x}"


def description(base: Base) -> dict[str, Any]:
    """What a run must share with one that goes on with its checkpoint."""
    lora, quantization = base.config.lora, base.config.quantization
    return {
        "base": base_fingerprint(base),
        "model": type(base.skeleton.model).__name__,
        "compute_dtype": str(base.config.compute_dtype).removeprefix("torch."),
        "quantization": {k: str(v) for k, v in sorted(vars(quantization).items())},
        "lora": {
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "lora_dropout": lora.lora_dropout,
            "use_rslora": bool(lora.use_rslora),
            "bias": lora.bias,
            "sites": sum(site.adapt for site in base.sites.values()),
        },
    }


def versions() -> dict[str, str]:
    """Of what is installed."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:
            continue
    return found


def stamp(folder: Path, base: Base) -> str:
    """The text of ``qlora_fx.json`` for the files of ``folder``."""
    files = {p.name: checksum(p) for p in sorted(folder.iterdir()) if p.is_file()}
    content = {"format": 1, "of": description(base), "versions": versions(), "crc32": files}
    return json.dumps(content, indent=2) + "\n"


def checksum(path: Path) -> str:
    """CRC-32 of a file."""
    found = 0
    with open(path, "rb") as f:
        while part := f.read(1 << 20):
            found = zlib.crc32(part, found)
    return f"{found:08x}"


def check(folder: str | os.PathLike[str], base: Base) -> None:
    """Whether ``folder`` is a whole checkpoint of this base and these settings; one without a stamp is taken as it is.

    Other versions of the libraries give a warning.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint is of something else.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(
            f"{os.fspath(folder)!r} is no folder; accepted: a trainer's checkpoint"
        )
    try:
        content = json.loads((path / STAMP).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except ValueError as error:
        raise CheckpointError(f"{path / STAMP} is damaged: {error}") from error
    for name, expected in content["crc32"].items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}, which was saved there")
        if checksum(path / name) != expected:
            raise CheckpointError(
                f"{path / name} is damaged: its checksum is not the one that was saved. "
                "Resume from an earlier checkpoint"
            )
    saved, here = flat(content["of"]), flat(description(base))
    for name, value in saved.items():
        if here.get(name) == value:
            continue
        if name == "base":
            what = "another base: its weights are not those of this model"
        else:
            what = f"{name}={value!r}, this model has {here.get(name)!r}"
        raise CheckpointError(f"{path} was saved from {what}")
    now = versions()
    others = [
        f"{name} {was} then, {now.get(name, 'none')} now"
        for name, was in content["versions"].items()
        if now.get(name) != was
    ]
    if others:
        warnings.warn(
            f"{path} was saved with other versions, which need not give the same bits: {'; '.join(others)}",
            stacklevel=users_stacklevel(),
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
