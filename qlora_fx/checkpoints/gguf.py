"""A GGUF file as a source, dequantized tensor by tensor with transformers' own readers and conversions.

transformers 5.23 has two readers: a new one, which is lazy, for a few architectures, and an old one for the others,
which returns all tensors at once. Of the old one the parts are used: its map of names, and its processor of
single tensors. Only where a processor puts several tensors together (experts) is the whole file dequantized at once.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GgufConfig

from ..errors import CheckpointError, ConfigError
from ..transformers_internals import (
    WeightRenaming,
    gguf_conversions,
    gguf_quantizer,
    lazy_gguf_tensor,
    older_gguf_reader,
)
from .conversion import Group, plan


def open_file(path: Path) -> LazyFile | TensorwiseFile:
    """The reader for a GGUF file.

    Raises:
        CheckpointError: it is no GGUF file, or damaged.
        ConfigError: the package ``gguf`` is needed and missing.
    """
    quantizer = gguf_quantizer(GgufConfig(dequantize=True, gguf_file=path.name))
    try:
        quantizer.read_header(str(path))
        return LazyFile(path, quantizer) if quantizer.supported else TensorwiseFile(path)
    except ImportError as error:
        if error.name != "gguf":
            raise  # a name of transformers' that is not there is no missing package
        raise ConfigError(
            f"{path.name} needs the package gguf: pip install 'gguf>=0.17'"
        ) from error
    except CheckpointError:
        raise
    except (
        Exception
    ) as error:  # struct.error, ValueError, KeyError, ...: by where the file is damaged
        raise CheckpointError(f"{path} cannot be read as GGUF: {error!r}") from error


class LazyFile:
    """transformers' lazy reader: its tensors are read here by file offset, not through its memory map."""

    def __init__(self, path: Path, quantizer: Any) -> None:
        self.path, self.lazy, self.quantizer = path, lazy_gguf_tensor(), quantizer
        header = quantizer.header
        self.infos = {info.name: info for info in header.tensors}
        self.start = header.data_start
        self.shapes: dict[str, tuple[int, ...]] = {}
        last = max(header.tensors, key=lambda info: int(info.offset))
        check_end(path, last.name, self.start + last.offset + last.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        """What the file was written in; of quantized blocks float32, as transformers has it."""
        found: torch.dtype | None = self.quantizer.header.dtype
        return torch.float32 if found is None else found

    def bytes_of(self, name: str) -> int:
        return int(self.infos[name].nbytes)

    def plan(self, model: Any, dtype: torch.dtype) -> tuple[list[Group], list[str]]:
        """How the tensors become parameters: dequantize, rename, permute, cast to ``dtype``."""
        self.quantizer.update_dtype(dtype)
        self.quantizer.preprocess_model(model)
        lazy = self.quantizer.get_state_dict(str(self.path), model)
        self.shapes = {name: tensor.shape for name, tensor in lazy.items()}
        return plan(model, list(self.infos), gguf_conversions(self.quantizer, model))

    def read(self, name: str) -> torch.Tensor:
        """The tensor as transformers hands it to its conversions: values, or blocks as bytes."""
        info = self.infos[name]
        data = np.fromfile(self.path, np.uint8, info.nbytes, offset=self.start + info.offset)
        tensor: torch.Tensor = self.lazy(data, info.ggml_type, self.shapes[name])[...]
        return tensor


class TensorwiseFile:
    """transformers' older reader, one tensor at a time."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self.path, self.older = path, older_gguf_reader()
        self.reader: Any = GGUFReader(str(path))
        self.tensors = {t.name: t for t in self.reader.tensors}
        for t in self.reader.tensors:
            check_end(path, t.name, int(t.data_offset) + int(t.n_bytes))
        self.architecture = self.older.read_field(self.reader, "general.architecture")[0]
        self.dtype = torch.float32
        self.processor: Any = None
        self.names: dict[str, str] = {}
        self.whole: dict[str, torch.Tensor] = {}

    def bytes_of(self, name: str) -> int:
        return int(self.tensors[name].n_bytes) if name in self.tensors else self.whole[name].nbytes

    def plan(self, model: Any, dtype: torch.dtype) -> tuple[list[Group], list[str]]:
        """The same with the older reader's map of names."""
        kind = self.older.TENSOR_PROCESSORS.get(self.architecture, self.older.TensorProcessor)
        parsed = self.older.load_gguf_checkpoint(str(self.path))
        self.processor = kind(config=parsed["config"])
        self.names = self.older.get_gguf_hf_weights_map(model, self.processor)
        found = {name: self.names[name] for name in self.tensors if name in self.names}
        unexpected = [name for name in self.tensors if name not in found]
        if any("_exps" in name or "_exp." in name for name in unexpected):
            self.whole = self.older.load_gguf_checkpoint(
                str(self.path), return_tensors=True, model_to_load=model, torch_dtype=dtype
            )["tensors"]
            found, unexpected = {name: name for name in self.whole}, []
        groups = [
            Group(name, WeightRenaming(name, name), [(theirs, theirs)])
            for theirs, name in found.items()
        ]
        return groups, unexpected

    def read(self, name: str) -> torch.Tensor:
        """The dense tensor in the model's own order."""
        if self.whole:
            return self.whole.pop(name)
        from gguf import dequantize

        t = self.tensors[name]
        weights = dequantize(t.data, t.tensor_type)
        result = self.processor.process(
            weights=weights, name=name, tensor_key_mapping=self.names, parsed_parameters={}
        )
        tensor = torch.from_numpy(np.array(result.weights))
        mapped = getattr(self.reader.data, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)  # pages of the file that were read count as ours
        return tensor


def check_end(path: Path, name: str, end: int) -> None:
    size = path.stat().st_size
    if size < end:
        raise CheckpointError(f"{path} is truncated: it has {size} bytes, and {name} ends at {end}")
