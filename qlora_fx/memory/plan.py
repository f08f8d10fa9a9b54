"""``plan``: how much memory a training step will take, known from the config alone, before any is spent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from ..checkpoints.empty_model import build, choose_dtype, find_class, read_config
from ..checkpoints.locate import find
from ..compiler.request import Request
from ..errors import ConfigError
from ..units import parse_size
from .estimate import draft
from .fit import search
from .report import Plan
from .resident import state_bytes

DEVICES = ("cuda", "cpu")


def plan(
    source: Any,
    lora: LoraConfig | None = None,
    quantization: BitsAndBytesConfig | bool | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: str = "PagedAdamW32bit",
    memory_budget: int | float | str = 1.0,
    fit: int | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    compute_dtype: torch.dtype | str | None = torch.bfloat16,
    blocksize: int = 64,
    also_quantize: Iterable[str] = (),
    device: str = "cuda",
    model_class: Any = None,
    revision: str | None = None,
    token: str | None = None,
) -> Plan:
    """How much memory one training step takes, from the config alone: no weights, no GPU.

    The model is traced on fake tensors, rewritten and split into forward and backward as ``transform`` does it;
    bytes are read off those graphs and the rules of 4-bit storage. Counted are tensors: what
    ``torch.cuda.max_memory_allocated`` gives, and paged optimizer state, which is not in that. Libraries, compiled
    code and the scratch that kernels take for themselves are not.

    Args:
        source: a folder or hub id (only config.json is read), a ``transformers.PretrainedConfig``, or a model.
        lora, quantization, compute_dtype, blocksize, also_quantize: as for ``transform``; both dtypes are bfloat16
            unless given.
        batch_size, sequence_length: of the training batch; every token gives loss.
        optimizer: as for ``QLoRAModel.paged_optimizer``.
        memory_budget: as for ``transform``, but never None: what is free is another number on every machine. The
            default, 1.0, keeps everything.
        fit: memory the peak shall fit, as bytes or "24GB". What has to give is changed, cheapest loss of speed
            first: the memory budget, the optimizer to 8 bits, the batch, the rank, the sequence.
        dtype: of the model's 16- or 32-bit weights.
        device: "cuda" or "cpu", which differ in what the loss and experts take while they run: on a GPU logits of a
            thousand rows, and a whole stack of experts in bfloat16.
        model_class, revision, token: as for ``from_pretrained``.

    Returns:
        The plan: ``storage``, ``constants``, ``adapters``, ``gradients``, ``optimizer``, ``activations``, ``workspace``
        and ``peak`` in bytes, ``timeline``, ``settings`` to train with, ``print``, ``plot``, ``fits``, ``methods``.

    Raises:
        ConfigError: an argument that cannot be honoured, or nothing that fits.
        CheckpointError: a source without a config that transformers reads.
        CaptureError: the model's Python cannot be captured.
    """
    for name, number in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(f"{name}={number!r}; accepted: an integer of at least 1")
    state_bytes(optimizer, [])  # a name that is not known
    limit = None if fit is None else parse_size(fit, "fit")
    request = Request.check(
        lora,
        quantization,
        compute_dtype=compute_dtype,
        blocksize=blocksize,
        also_quantize=also_quantize,
        memory_budget=memory_budget,
        backend="aot_eager",
    )
    if request.memory_budget is None:
        raise ConfigError(
            "memory_budget=None is what is free where a model is trained, which a plan does not know; accepted: bytes, "
            "or a fraction from 0.0 to 1.0 (keep everything, the default)"
        )
    if device not in DEVICES:
        raise ConfigError(f"device={device!r}; accepted: {', '.join(map(repr, DEVICES))}")
    on_gpu = device == "cuda"
    model = model_of(source, dtype, model_class, revision, token)
    first = draft(model, request, on_gpu)
    asked: dict[str, Any] = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "optimizer": optimizer,
        "memory_budget": request.memory_budget,
    }
    if limit is None:
        return first.plan(**asked)
    return search(
        first, asked, limit, lambda lower: draft(model, replace(request, lora=lower), on_gpu)
    )


def model_of(source: Any, dtype: Any, kind: Any, revision: str | None, token: str | None) -> Any:
    """The model of a config, on the meta device; a model as it is."""
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, PretrainedConfig):
        config = type(source).from_dict(source.to_dict())
    elif isinstance(source, (str, os.PathLike)):
        config = read_config(find(source, revision=revision, token=token, weights=False))
    else:
        raise ConfigError(
            f"source={source!r}; accepted: a folder, a hub id, a transformers config, or a model"
        )
    chosen = choose_dtype(config, dtype, ())
    model = build(config, find_class(config, kind), chosen)
    model.tie_weights()
    return model
