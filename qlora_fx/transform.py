"""The door: ``transform(model)``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import fx, nn
from transformers import BitsAndBytesConfig

from .capture.check_model import check_model, mark_used_up
from .capture.skeleton import named_tensors
from .compiler.compile import prepare
from .compiler.printer import text
from .compiler.request import Request
from .model import QLoRAModel
from .runtime.allocator import give_back, keep_freed_memory
from .weights.move import move_weights


def transform(
    model: nn.Module,
    lora: LoraConfig | None = None,
    quantization: BitsAndBytesConfig | bool | None = None,
    *,
    compute_dtype: torch.dtype | str | None = None,
    blocksize: int = 64,
    also_quantize: Iterable[str] = (),
    example_inputs: Mapping[str, Any] | None = None,
    memory_budget: int | float | str | None = None,
    disable: Iterable[str] = (),
    backend: str = "inductor",
    cuda_graphs: bool = False,
    training: bool = True,
) -> QLoRAModel:
    """Compile a Hugging Face model into its QLoRA form.

    Captures the forward on fake weights, rewrites each linear to 4-bit storage and a
    dequantize-matmul-LoRA subgraph, verifies the graph, and only then moves the weights: each dense weight
    of a rewritten linear is released as it is quantized, one at a time. On success ``model`` is used up
    (calling it says so); on an error it is as it was.

    Args:
        model: a ``transformers.PreTrainedModel`` with real 16- or 32-bit weights on one device.
        lora: a ``peft.LoraConfig``. Default: r=16, lora_alpha=16, all linears but the output head. Adapters
            are float32. ``target_modules=None`` means "all-linear".
        quantization: a ``transformers.BitsAndBytesConfig(load_in_4bit=True, ...)``. Default: NF4 with double
            quantization. False quantizes nothing: plain LoRA through the same compiler.
        compute_dtype: dtype in which linears multiply; "auto" measures which of bfloat16 and float32 is
            faster here. Default: ``quantization.bnb_4bit_compute_dtype``, or "auto" where no
            ``quantization`` is given. Activations have the wider of it and the model's dtype.
        blocksize: weights per absmax: 32, 64, 128, ... 4096.
        also_quantize: parts of the model to store in 4 bits that are dense by default: "head" (the output head),
            "embeddings" (the input embedding; only the rows used are dequantized), "routers". A head that is
            tied to the embedding needs both.
        example_inputs: arguments of one call, by name; only their shapes and dtypes are used. Default: made
            from the model's signature.
        memory_budget: what a training step may hold from forward to backward: bytes (also as "6GB"), or a fraction
            of what keeping everything takes (0.0 keeps only the blocks' inputs, as gradient checkpointing does).
            What does not fit is computed again. Default: as much as is free. ``qmodel.memory_budget`` changes it.
            Only None with backend "eager", which computes nothing again.
        disable: names of optimizations to leave out, to find out what one of them does: members of
            ``qlora_fx.compiler.pipeline.OPTIONAL``. The numbers stay the same but for rounding.
        backend: "inductor", "aot_eager" (same graphs, PyTorch's kernels), or "eager" (plain autograd for
            debugging; it keeps dequantized weights until backward).
        cuda_graphs: record what blocks launch on a GPU, once for each batch and sequence, and replay it as one launch.
            Worth it where steps are short: the host needs longer to launch than the GPU to compute. Rows padded to
            few lengths, or packed, are recorded once; a third call of a shape is recorded, eight shapes at most. Its
            memory stays taken between steps. Generated tokens are recorded as well, for each room of their cache (a
            power of two). ``qmodel.cuda_graphs`` changes it.
        training: False for a model that generates: the prompt of a generation is captured now, and a training step on
            its first use, instead of the other way round.

    Returns:
        The model in training mode, or with ``training=False`` in eval mode; compiled on its first call.

    Raises:
        ConfigError: a field or argument that cannot be honoured, or a target that matches nothing.
        ModelError: weights that are quantized already, not finite, not there (meta), or on several devices.
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
    check_model(model)
    device = next(iter(named_tensors(model)))[1].device
    if device.type == "cpu":
        keep_freed_memory()
    prepared = prepare(model, request)
    move_weights(model, prepared.base)
    qmodel = QLoRAModel(prepared)
    mark_used_up(model)
    give_back(device, prepared.base.store.tensors.values())
    return qmodel


def graph_text(qmodel: QLoRAModel | fx.GraphModule) -> str:
    """The rewritten graph as text (the first capture's)."""
    return text(qmodel if isinstance(qmodel, fx.GraphModule) else qmodel.graph_module)
