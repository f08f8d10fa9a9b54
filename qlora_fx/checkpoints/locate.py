"""Where a checkpoint comes from: a local folder, a hub id, or a GGUF file. Only safetensors and JSON are read."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..runtime.safetensors_reader import Entry, read_header, read_json

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OWN_SINGLE, OWN_INDEX = "quantized.safetensors", "quantized.safetensors.index.json"
"""Of the format that only qlora_fx reads (save.py). transformers looks for other names and finds none."""
OWN_METHOD = "qlora_fx"
"""``quantization_config.quant_method`` of that format."""
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "consolidated.00.pth")
BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""What lies beside the weights and belongs to the model; copied as it is, never interpreted."""


@dataclass
class Source:
    """A checkpoint whose files were found and whose headers are whole.

    Attributes:
        name: what the user passed.
        folder: where its files are.
        config: ``config.json`` as it is; empty for a GGUF file.
        entries: every tensor of its files, by name; empty for a GGUF file.
        gguf: the GGUF file, where it is one.
    """

    name: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    gguf: Path | None = None

    @property
    def quantization(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.config.get("quantization_config")
        return found


def find(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    gguf_file: str | None = None,
    weights: bool = True,
) -> Source:
    """Resolve a source and read its headers; no value is read.

    Args:
        weights: False reads the config alone, and downloads nothing else.

    Raises:
        CheckpointError: nothing is there, it is in a format that is not read, or its files are damaged or
            contradict each other. The message names the file, and the tensor where there is one.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf" and gguf_file is None:
        path, gguf_file = path.parent, path.name
    if not path.is_dir():
        if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            kind = "no folder" if path.exists() else "not there"
            raise CheckpointError(
                f"{name!r} is {kind}; accepted: a folder with {CONFIG} and safetensors files, a .gguf "
                "file, or a hub id like 'org/name'"
            )
        path = from_hub(name, revision, token, gguf_file, weights)
    if gguf_file is not None:
        file = path / gguf_file
        if not file.is_file():
            raise CheckpointError(f"{name!r} has no {gguf_file} ({listing(path)})")
        return Source(name, path, gguf=file)
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{name!r} has no {CONFIG} ({listing(path)})")
    config = read_json(path / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path / CONFIG} is a {type(config).__name__}, not an object")
    return Source(name, path, config, read_entries(path, config) if weights else {})


def listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.iterdir())
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it has: {', '.join(names[:8]) or 'nothing'}{more}"


def weight_files(config: dict[str, Any]) -> tuple[str, str]:
    """Names of the single file and of the index."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    return (OWN_SINGLE, OWN_INDEX) if method == OWN_METHOD else (SINGLE, INDEX)


def read_entries(folder: Path, config: dict[str, Any]) -> dict[str, Entry]:
    """Every tensor of a folder's safetensors files.

    Raises:
        CheckpointError: files are missing or damaged, or do not hold what the index says.
    """
    single, index = weight_files(config)
    if (folder / single).is_file():
        return {e.name: e for e in read_header(folder / single)[0]}
    if not (folder / index).is_file():
        pickles = [name for name in PICKLES if (folder / name).is_file()]
        remedy = ""
        if pickles:
            remedy = (
                f". {pickles[0]} is a pickle, which can run code when it is read, and is not read here. If "
                "you trust it, convert it once: model = AutoModelForCausalLM.from_pretrained(folder); "
                "model.save_pretrained(new_folder)"
            )
        raise CheckpointError(
            f"{folder} has no {single} and no {index} ({listing(folder)}){remedy}"
        )
    weight_map = read_weight_map(folder / index)
    entries: dict[str, Entry] = {}
    for name in sorted(set(weight_map.values())):
        file = folder / name
        if not file.is_file():
            lost = next(k for k, v in weight_map.items() if v == name)
            raise CheckpointError(f"{file} is not there; {index} has {lost} and others in it")
        found = {e.name: e for e in read_header(file)[0]}
        expected = {k for k, v in weight_map.items() if v == name}
        for key in sorted(expected - found.keys()):
            raise CheckpointError(f"{key} is not in {file}, where {index} says it is")
        for key in sorted(found.keys() - expected):
            where = weight_map.get(key, "no file")
            raise CheckpointError(f"{key} is in {file}; {index} says it is in {where}")
        entries.update(found)
    return entries


def read_weight_map(path: Path) -> dict[str, str]:
    """The index of a sharded checkpoint: the file of each tensor.

    Raises:
        CheckpointError: it is no index, or names a file outside the folder or of another kind.
    """
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map; accepted: {{tensor name: file name}}")
    for key, name in weight_map.items():
        plain = isinstance(name, str) and name == os.path.basename(name)
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} has {key} in {name!r}; accepted: a .safetensors file in the same folder"
            )
    return weight_map


def from_hub(
    name: str, revision: str | None, token: str | None, gguf_file: str | None, weights: bool
) -> Path:
    """The folder of a hub model in huggingface_hub's cache; files that are not there are downloaded.

    Raises:
        CheckpointError: with the hub's reason.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(patterns: Iterable[str]) -> Path:
        return Path(
            snapshot_download(name, revision=revision, token=token, allow_patterns=list(patterns))
        )

    try:
        if gguf_file is not None:
            return fetch([gguf_file])
        if not weights:
            return fetch([CONFIG])
        folder = fetch([CONFIG, INDEX, OWN_INDEX, *BESIDE])
        if not (folder / CONFIG).is_file():
            return folder
        single, index = weight_files(read_json(folder / CONFIG))
        files = set(read_weight_map(folder / index).values()) if (folder / index).is_file() else ()
        return fetch(files or [single])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{name!r} is no local folder, and the hub gave: {first}. Accepted: a folder with {CONFIG} and "
            "safetensors files, a .gguf file, or a hub id that can be reached or is in the cache"
        ) from error
