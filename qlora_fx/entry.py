"""The door: ``transform(model)``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig
from torch import fx, nn
from transformers import BitsAndBytesConfig

from . import pipeline
from .budget import check_budget
from .capture import Blueprint, named_tensors
from .checks import check_model, mark_used_up
from .config import (
    Config,
    check_compute_dtype,
    check_disabled,
    check_lora,
    check_quantization,
    check_roles,
)
from .errors import ConfigError
from .inputs import bind, example_inputs, signature_key, without_cache
from .model import QLoRAModel, decide
from .passes.adapt import lora_keys
from .passes.lower import BACKENDS
from .passes.warm_up import warm_up
from .runtime.allocator import give_back, keep_freed_memory
from .runtime.dtype import ComputeDtype, fastest
from .runtime.storage import QUANT_MAP, quantize_weight
from .runtime.store import QuantizedShape
from .signature import Signature, graph_title, skips_logits


def transform(
    model: nn.Module,
    lora: LoraConfig | None = None,
    quantization: BitsAndBytesConfig | None = None,
    *,
    compute_dtype: torch.dtype | str | None = None,
    blocksize: int = 64,
    also_quantize: Iterable[str] = (),
    example_inputs: Mapping[str, Any] | None = None,
    memory_budget: int | float | str | None = None,
    disable: Iterable[str] = (),
    backend: str = "inductor",
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
            quantization.
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
        disable: names of optimizations to leave out, to find out what one of them does: members of
            ``qlora_fx.pipeline.OPTIONAL``. The numbers stay the same but for rounding.
        backend: "inductor", "aot_eager" (same graphs, PyTorch's kernels), or "eager" (plain autograd for
            debugging; it keeps dequantized weights until backward).

    Returns:
        The model in training mode; compiled on its first call.

    Raises:
        ConfigError: a field or argument that cannot be honoured, or a target that matches nothing.
        ModelError: weights that are quantized already, not finite, not there (meta), or on several devices.
        CaptureError: the model's Python cannot be captured.
    """
    lora = check_lora(lora)
    storage, asked = check_quantization(quantization, blocksize)
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}; accepted: {', '.join(BACKENDS)}")
    budget = check_budget(memory_budget)
    check_model(model)
    blueprint = Blueprint(model)
    if blueprint.device.type == "cpu":
        keep_freed_memory()
        if backend == "inductor":
            warm_up.start()
    compute = choose_compute_dtype(compute_dtype, asked, blueprint.device)
    activations = torch.promote_types(blueprint.dtype, compute.dtype)
    config = Config(
        lora,
        storage,
        compute.dtype,
        output_heads(model, blueprint),
        input_embeddings(model, blueprint),
        check_roles(also_quantize),
        disabled=check_disabled(disable, pipeline.OPTIONAL),
    )

    values = example_values(model, blueprint, example_inputs)
    capture = blueprint.capture(values, training=True, dtype=activations)
    config = config.with_(return_logits=not skips_logits(True, values))
    result = pipeline.run(capture.gm, config, title=graph_title(True, values))
    decided = decide(result.flat)

    qmodel = QLoRAModel(blueprint, config, compute, activations, backend)
    qmodel._sites = decided
    qmodel._memory_budget = budget
    move_weights(model, qmodel, config)
    add_adapters(qmodel, config)
    qmodel._install(
        Signature(True, True, config.return_logits, signature_key(values)), capture, result
    )
    mark_used_up(model)
    give_back(blueprint.device, (t for _, t in qmodel._store.items()))
    return qmodel


def choose_compute_dtype(
    argument: Any, asked: torch.dtype | None, device: torch.device
) -> ComputeDtype:
    """The argument wins over the config; without either, the fastest is measured."""
    if argument is not None:
        dtype = check_compute_dtype(argument)
        if dtype is not None:
            return ComputeDtype(dtype, "as asked for by compute_dtype")
    elif asked is not None:
        dtype = check_compute_dtype(asked)
        assert dtype is not None
        return ComputeDtype(dtype, "as asked for by bnb_4bit_compute_dtype")
    return fastest(str(device))


def output_heads(model: Any, blueprint: Blueprint) -> frozenset[str]:
    """Store keys of the output embeddings' tensors."""
    return keys_of(embedding_module(model, "get_output_embeddings"), model, blueprint)


def input_embeddings(model: Any, blueprint: Blueprint) -> frozenset[str]:
    """Store keys of the input embedding's tensors."""
    return keys_of(embedding_module(model, "get_input_embeddings"), model, blueprint)


def embedding_module(model: Any, getter: str) -> Any:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None  # vision and speech models have none


def keys_of(module: Any, model: Any, blueprint: Blueprint) -> frozenset[str]:
    if not isinstance(module, nn.Module):
        return frozenset()
    wanted = {id(p) for p in module.parameters()}
    return frozenset(blueprint.keys[name] for name, t in named_tensors(model) if id(t) in wanted)


def example_values(
    model: Any, blueprint: Blueprint, given: Mapping[str, Any] | None
) -> dict[str, Any]:
    if given is None:
        given = example_inputs(model, blueprint.signature)
    return without_cache(blueprint.signature, bind(blueprint.signature, (), dict(given)))


def move_weights(model: nn.Module, qmodel: QLoRAModel, config: Config) -> None:
    """Move every tensor of ``model`` to the store; quantize selected weights one at a time.

    Nothing here keeps a reference to a dense weight once its storage exists.
    """
    places: dict[str, list[tuple[nn.Module, str]]] = {}
    for name, key in qmodel._blueprint.keys.items():
        path, _, leaf = name.rpartition(".")
        places.setdefault(key, []).append((model.get_submodule(path), leaf))
    by_weight = {site.weight: site for site in qmodel._sites.values() if site.quantize}
    for key, where in places.items():
        module, leaf = where[0]
        site = by_weight.get(key)
        tensor = getattr(module, leaf)
        qmodel._dense_bytes[key] = tensor.nbytes
        if site is not None:
            assert site.layout is not None
            dense = site.layout.of(tensor.detach())
            parts = quantize_weight(dense, config.quantization)
            qmodel._store.add_quantized(
                key, parts, QuantizedShape(site.shape, tensor.dtype, config.quantization)
            )
            for owner, name in where:
                owner._parameters[name] = nn.Parameter(
                    torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"),
                    requires_grad=False,
                )
            del tensor, dense, parts
        elif isinstance(tensor, nn.Parameter):
            qmodel._store.add(key, tensor.requires_grad_(False))
        else:
            persistent = leaf not in module._non_persistent_buffers_set
            qmodel._store.add(key, tensor, persistent=persistent)
    if any(site.kind == "embedding" and site.quantize for site in qmodel._sites.values()):
        kind = config.quantization.quant_type
        values = bnb.get_4bit_type(kind, device=str(qmodel.device))
        qmodel._store.tensors[f"{QUANT_MAP}.{kind}"] = values


def add_adapters(qmodel: QLoRAModel, config: Config) -> None:
    """Make ``lora_A`` and ``lora_B`` of each adapted site, initialized as PEFT does.

    ``init_lora_weights=True``: A Kaiming-uniform with a = sqrt(5), B zero. ``"gaussian"``: A normal with
    standard deviation 1/r, B zero. ``False``: both Kaiming-uniform, so that the adapter is not a no-op.
    """
    init = config.lora.init_lora_weights
    for site in qmodel._sites.values():
        key_a, key_b = lora_keys(site)
        if not site.adapt or key_a in qmodel._store:
            continue
        shape_a, shape_b = site.lora_shapes()
        a = torch.empty(shape_a, device=qmodel.device)
        b = torch.zeros(shape_b, device=qmodel.device)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / site.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        qmodel._store.add(key_a, nn.Parameter(a))
        qmodel._store.add(key_b, nn.Parameter(b))


def graph_text(qmodel: QLoRAModel | fx.GraphModule) -> str:
    """The rewritten graph as text (the first capture's)."""
    from .printer import text

    return text(qmodel if isinstance(qmodel, fx.GraphModule) else qmodel.graph_module)
