"""``from_pretrained``: from a checkpoint to a model in 4 bits, without its dense weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, Conv1D

from .capture.skeleton import Skeleton
from .checkpoints.four_bit import merge_settings
from .checkpoints.load import fill
from .checkpoints.locate import find
from .checkpoints.open import Checkpoint, open_checkpoint
from .compiler.compile import Prepared, prepare
from .compiler.request import Request
from .errors import ConfigError
from .model import QLoRAModel
from .runtime.allocator import give_back, keep_freed_memory
from .weights.base import Origin


def from_pretrained(
    source: str | os.PathLike[str],
    lora: LoraConfig | None = None,
    quantization: BitsAndBytesConfig | bool | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    compute_dtype: torch.dtype | str | None = None,
    blocksize: int = 64,
    also_quantize: Iterable[str] = (),
    example_inputs: Mapping[str, Any] | None = None,
    memory_budget: int | float | str | None = None,
    disable: Iterable[str] = (),
    backend: str = "inductor",
    cuda_graphs: bool = False,
    training: bool = True,
    model_class: Any = None,
    revision: str | None = None,
    token: str | None = None,
    gguf_file: str | None = None,
    progress: bool = True,
) -> QLoRAModel:
    """Load a checkpoint straight to 4 bits and compile it, as ``transform`` does with a loaded model.

    The model is built without weights, captured and rewritten; every tensor of the checkpoint is checked by
    its header; and only then its values are read, once, in the order of the files, each quantized to its
    storage and let go. Resident memory stays below what the model holds in the end plus the largest tensor.

    Args:
        source: a folder with ``config.json`` and safetensors files (one, or sharded with an index); a hub id,
            through huggingface_hub's cache; or a ``.gguf`` file. A checkpoint that transformers + bitsandbytes
            saved in 4 bits, or ``save_quantized``, keeps its bytes. Nothing else is read: no pickle, no code.
        lora, compute_dtype, blocksize, also_quantize, example_inputs, memory_budget, disable, backend,
            cuda_graphs, training: as in ``transform``.
        quantization: as in ``transform``. Of a checkpoint in 4 bits: its own settings; what is given must equal
            them, but for the compute dtype.
        device: where the model will run. Default: "cuda" where there is one, else "cpu".
        dtype: of the dense model; weights are cast to it before they are quantized. "auto": the config's.
        model_class: a class of transformers, or an Auto class. Default: ``config.architectures[0]``.
        revision, token: of a hub id.
        gguf_file: name of a GGUF file in the folder or hub repository.
        progress: show a bar on a terminal.

    Returns:
        The model in training mode, or with ``training=False`` in eval mode; compiled on its first call.

    Raises:
        ConfigError: a field or argument that cannot be honoured, or a target that matches nothing.
        CheckpointError: nothing is there, a file is damaged or contradicts its index, or a tensor is missing,
            unknown, or of a wrong shape or dtype. The message names the tensor and the file.
        CaptureError: the model's Python cannot be captured.
    """
    request = Request.check(
        lora,
        quantization,
        compute_dtype=compute_dtype,
        blocksize=blocksize,
        also_quantize=also_quantize,
        example_inputs=example_inputs,
        memory_budget=memory_budget,
        disable=disable,
        backend=backend,
        cuda_graphs=cuda_graphs,
        training=training,
    )
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = find(source, revision=revision, token=token, gguf_file=gguf_file)
    with open_checkpoint(found, dtype=dtype, kind=model_class, device=place) as checkpoint:
        prepared = prepare_checkpoint(checkpoint, request, quantization, place)
        fill(prepared.base, checkpoint, progress=progress)
    prepared.base.origin = Origin(found.folder, found.gguf)
    if place.type == "cpu":
        keep_freed_memory()  # only now: what loading freed is given back
    qmodel = QLoRAModel(prepared)
    give_back(place, prepared.base.store.tensors.values())
    return qmodel


def prepare_checkpoint(
    checkpoint: Checkpoint,
    request: Request,
    quantization: BitsAndBytesConfig | bool | None,
    device: torch.device,
) -> Prepared:
    """Compile the checkpoint's model. What arrives in 4 bits keeps its settings; what arrives dense beside it stays so.

    In bitsandbytes' format that is said of linears only; what it cannot hold in 4 bits (experts) is quantized
    here as always.
    """
    stored = checkpoint.settings
    if stored.quantization is None:
        return prepare(checkpoint.model, request, device)
    if request.quantization.is_dense:
        raise ConfigError(
            f"quantization=False, and {checkpoint.source.name!r} is in 4 bits; accepted: quantization=None"
        )
    request = replace(
        request,
        quantization=merge_settings(
            stored, quantization, request.quantization, checkpoint.source.name
        ),
        quantization_dtype=(
            request.quantization_dtype if quantization is not None else stored.compute_dtype
        ),
        also_quantize=request.also_quantize | set(stored.also_quantize),
    )
    keys = Skeleton(checkpoint.model).keys
    arriving = frozenset(keys[name] for name in checkpoint.stored)
    if any(weight.own for weight in stored.weights.values()):
        dense = frozenset(keys.values()) - arriving
    else:
        dense = frozenset(
            keys[f"{path}.weight"]
            for path, module in checkpoint.model.named_modules()
            if isinstance(module, (torch.nn.Linear, Conv1D))
        )
    return prepare(checkpoint.model, request, device, stored=arriving, kept=dense - arriving)
