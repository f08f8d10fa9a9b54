"""Adapter folders in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the module path in its saved keys."""


def save(
    folder: str | os.PathLike[str], tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> None:
    """Write both files, each under a temporary name first, so that a kill leaves the old or the new one."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    scratch = path / f".{WEIGHTS}.{os.getpid()}"
    try:
        save_file(contiguous, scratch, metadata={"format": "pt"})
        replace(scratch, path / WEIGHTS)
    finally:
        scratch.unlink(missing_ok=True)
    write_text(path / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    replace(scratch, path)


def replace(scratch: Path, path: Path) -> None:
    with open(scratch, "rb") as f:
        os.fsync(f.fileno())
    os.replace(scratch, path)


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the config of an adapter folder.

    Raises:
        AdapterError: a file is missing, truncated, or not an adapter of PEFT's.
    """
    path = Path(folder)
    if not path.is_dir():
        raise AdapterError(
            f"{os.fspath(folder)!r} is not a folder; accepted: a folder with {CONFIG} and {WEIGHTS}"
        )
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            there = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
            raise AdapterError(f"{os.fspath(folder)!r} has no {name} (it has: {there})")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(f"{path / CONFIG} has peft_type={kind!r}; accepted: 'LORA'")
    try:
        with safe_open(path / WEIGHTS, framework="pt") as f:
            tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path / WEIGHTS} cannot be read: {error}") from error
    return tensors, config
