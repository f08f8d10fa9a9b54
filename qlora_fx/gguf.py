"""A GGUF file as a source, dequantized tensor by tensor with transformers' own reader and conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GgufConfig

from .errors import CheckpointError


class GgufFile:
    """The tensors of a GGUF file, by the names they have there.

    Raises:
        CheckpointError: it is no GGUF file, or of an architecture that transformers does not stream.
    """

    def __init__(self, path: Path) -> None:
        from transformers.integrations.gguf.reader import LazyGgufTensor
        from transformers.quantizers.quantizer_gguf import GgufHfQuantizer

        self.path = path
        self.lazy = LazyGgufTensor
        self.quantizer: Any = GgufHfQuantizer(GgufConfig(dequantize=True, gguf_file=path.name))
        try:
            self.quantizer.read_header(str(path))
        except (
            Exception
        ) as error:  # a struct.error, ValueError, KeyError, ... by where the file is damaged
            raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
        if not self.quantizer.supported:
            raise CheckpointError(
                f"{path} is of an architecture whose GGUF files transformers reads only as a whole; convert it: "
                "AutoModelForCausalLM.from_pretrained(folder, gguf_file=..., quantization_config="
                "GgufConfig(dequantize=True)).save_pretrained(new_folder)"
            )
        header = self.quantizer.header
        self.infos = {info.name: info for info in header.tensors}
        self.start = header.data_start
        end = max(self.start + info.offset + info.nbytes for info in header.tensors)
        if path.stat().st_size < end:
            last = max(header.tensors, key=lambda info: info.offset)
            raise CheckpointError(
                f"{path} is truncated: it has {path.stat().st_size} bytes, and {last.name} ends at {end}"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}

    @property
    def names(self) -> list[str]:
        return list(self.infos)

    @property
    def dtype(self) -> torch.dtype:
        """What the file was written in; of quantized blocks float32, as transformers has it."""
        found: torch.dtype | None = self.quantizer.header.dtype
        return torch.float32 if found is None else found

    def bytes_of(self, name: str) -> int:
        return int(self.infos[name].nbytes)

    def mapping(self, model: Any, dtype: torch.dtype) -> list[Any]:
        """transformers' conversions for this file: dequantize, rename, permute, cast to ``dtype``."""
        self.quantizer.update_dtype(dtype)
        self.quantizer.preprocess_model(model)
        self.shapes = {
            name: tensor.shape
            for name, tensor in self.quantizer.get_state_dict(str(self.path), model).items()
        }
        conversions: list[Any] = self.quantizer.update_weight_conversions([], model)
        return conversions

    def read(self, name: str) -> torch.Tensor:
        """The tensor as transformers hands it to its conversions: values, or blocks as bytes."""
        info = self.infos[name]
        data = np.fromfile(self.path, np.uint8, info.nbytes, offset=self.start + info.offset)
        tensor: torch.Tensor = self.lazy(data, info.ggml_type, self.shapes[name])[...]
        return tensor
