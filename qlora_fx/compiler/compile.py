"""All of the compiler that needs no weights: checks, capture, pipeline, decisions.

``transform`` and ``from_pretrained`` share it; they differ in how the store is filled afterwards (weights/move.py,
checkpoints/load.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig

from ..capture.arguments import bind, example_inputs, signature_key, without_cache
from ..capture.signature import Signature, graph_title, skips_logits
from ..capture.skeleton import Blueprint, Capture, named_tensors
from ..config import (
    Config,
    Quantization,
    check_compute_dtype,
    check_disabled,
    check_lora,
    check_quantization,
    check_roles,
)
from ..errors import ConfigError
from ..memory.recompute import check_budget
from ..model import QLoRAModel, decide
from ..passes.adapt import lora_keys
from ..passes.graph.site import Site
from ..passes.lower import BACKENDS
from ..passes.lowering.warm_up import warm_up
from ..runtime.fastest_dtype import ComputeDtype, fastest
from . import pipeline


@dataclass(frozen=True)
class Settings:
    """The arguments of the door, checked.

    Attributes:
        lora: the user's, or the default.
        storage: how weights are stored.
        compute_dtype: the argument as given.
        asked: compute dtype of the ``BitsAndBytesConfig``; None where there is none.
        also_quantize: members of ``config.ROLES``.
        example_inputs: as given.
        memory_budget: as ``budget.check_budget`` returns it.
        disabled: names of stages that are left out.
        backend: one of ``BACKENDS``.
        stored: store keys of weights that arrive in 4 bits.
        kept: store keys of weights that stay dense because the checkpoint has them dense.
    """

    lora: LoraConfig
    storage: Quantization
    compute_dtype: Any = None
    asked: torch.dtype | None = None
    also_quantize: frozenset[str] = frozenset()
    example_inputs: Mapping[str, Any] | None = None
    memory_budget: int | float | None = None
    disabled: frozenset[str] = frozenset()
    backend: str = "inductor"
    stored: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

    def with_(self, **changes: Any) -> Settings:
        return replace(self, **changes)


def check_settings(
    lora: LoraConfig | None,
    quantization: BitsAndBytesConfig | None,
    *,
    compute_dtype: Any,
    blocksize: int,
    also_quantize: Iterable[str],
    example_inputs: Mapping[str, Any] | None,
    memory_budget: int | float | str | None,
    disable: Iterable[str],
    backend: str,
) -> Settings:
    """The arguments, if each can be honoured.

    Raises:
        ConfigError: naming the argument, its value, and what is accepted.
    """
    lora = check_lora(lora)
    storage, asked = check_quantization(quantization, blocksize)
    if backend not in BACKENDS:
        raise ConfigError(f"backend={backend!r}; accepted: {', '.join(BACKENDS)}")
    if compute_dtype is not None:
        check_compute_dtype(compute_dtype)
    return Settings(
        lora,
        storage,
        compute_dtype,
        asked,
        check_roles(also_quantize),
        example_inputs,
        check_budget(memory_budget),
        check_disabled(disable, pipeline.OPTIONAL),
        backend,
    )


@dataclass
class Prepared:
    """A model that is compiled as far as it can be without its weights.

    Attributes:
        blueprint: its Python.
        config: for the passes.
        compute: dtype in which linears multiply.
        activations: dtype of activations.
        settings: the checked arguments.
        values: the example call it was captured with.
        capture, result: of that call.
        sites: the verdicts, by site name.
    """

    blueprint: Blueprint
    config: Config
    compute: ComputeDtype
    activations: torch.dtype
    settings: Settings
    values: dict[str, Any]
    capture: Capture
    result: pipeline.Result
    sites: dict[str, Site]

    def model(self) -> QLoRAModel:
        """The model with an empty store."""
        qmodel = QLoRAModel(
            self.blueprint, self.config, self.compute, self.activations, self.settings.backend
        )
        qmodel._memory_budget = self.settings.memory_budget
        qmodel._sites = self.sites
        return qmodel

    def install(self, qmodel: QLoRAModel) -> None:
        """Add the adapters and the program to a model whose store is full."""
        add_adapters(qmodel, self.config)
        key = Signature(True, True, self.config.return_logits, signature_key(self.values))
        qmodel._install(key, self.capture, self.result)


def prepare(model: Any, settings: Settings, device: torch.device | None = None) -> Prepared:
    """Capture ``model`` on fake weights, run the pipeline, and decide what becomes of each weight.

    Args:
        model: a transformers model; its weights are not read and may be on the meta device.
        settings: the checked arguments.
        device: where the weights will be; default: where they are.

    Raises:
        ConfigError: a target that matches nothing, or a dtype that cannot be honoured.
        CaptureError: the model's Python cannot be captured.
    """
    blueprint = Blueprint(model, device)
    if blueprint.device.type == "cpu" and settings.backend == "inductor":
        warm_up.start()
    compute = choose_compute_dtype(settings.compute_dtype, settings.asked, blueprint.device)
    activations = torch.promote_types(blueprint.dtype, compute.dtype)
    heads, embeddings = output_heads(model, blueprint), input_embeddings(model, blueprint)
    config = Config(
        settings.lora,
        settings.storage,
        compute.dtype,
        heads,
        embeddings,
        settings.also_quantize,
        disabled=settings.disabled,
        stored=settings.stored,
        kept=settings.kept - heads - embeddings,
    )
    values = example_values(model, blueprint, settings.example_inputs)
    capture = blueprint.capture(values, training=True, dtype=activations)
    config = config.with_(return_logits=not skips_logits(True, values))
    result = pipeline.run(capture.gm, config, title=graph_title(True, values))
    sites = decide(result.flat)
    return Prepared(
        blueprint, config, compute, activations, settings, values, capture, result, sites
    )


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
        given = example_inputs(model, blueprint.signature, blueprint.device)
    return without_cache(blueprint.signature, bind(blueprint.signature, (), dict(given)))


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
