"""All of the compiler that needs no weights: capture, pipeline, decisions.

``transform`` and ``from_pretrained`` share it; they differ in how the store is filled afterwards (weights/move.py,
checkpoints/load.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from transformers import PreTrainedModel

from ..capture.arguments import Call, Signature
from ..capture.check_outputs import check_outputs
from ..capture.example_inputs import example_inputs, example_prompt
from ..capture.skeleton import Capture, Skeleton, named_tensors
from ..config import Config
from ..passes.graph.nodes import verdicts
from ..passes.graph.site import Site, Verdict
from ..passes.lowering.warm_up import warm_up
from ..runtime.fastest_dtype import ComputeDtype
from ..weights.base import Base, activation_dtype
from . import pipeline
from .check_lora import with_new_head
from .request import Request, check_cuda_graphs

Observe = Callable[[Capture, str, fx.GraphModule], None]
"""Called with the capture, each stage's name and its graph, which the next stage will change."""


@dataclass
class Prepared:
    """A model that is compiled as far as it can be without its weights.

    Attributes:
        base: its store is empty.
        compute: dtype in which linears multiply.
        request: what was asked for.
        signature: of the example call it was captured with.
        capture, result: of that call.
    """

    base: Base
    compute: ComputeDtype
    request: Request
    signature: Signature
    capture: Capture
    result: pipeline.Result


def prepare(
    model: PreTrainedModel,
    request: Request,
    device: torch.device | None = None,
    *,
    stored: frozenset[str] = frozenset(),
    kept: frozenset[str] = frozenset(),
) -> Prepared:
    """Capture ``model`` on fake weights, run the pipeline, and decide what becomes of each weight.

    Args:
        model: a transformers model; its weights are not read and may be on the meta device.
        request: the checked arguments.
        device: where the weights will be; default: where they are.
        stored: store keys of weights that arrive in 4 bits.
        kept: store keys of weights that stay dense because the checkpoint has them dense.

    Raises:
        ConfigError: a target that matches nothing, or a dtype that cannot be honoured.
        CaptureError: the model's Python cannot be captured.
    """
    skeleton = Skeleton(model, device)
    if skeleton.device.type == "cpu" and request.backend == "inductor":
        warm_up.start()
    check_cuda_graphs(request.cuda_graphs, request.backend, skeleton.device)
    compute = request.compute(skeleton.device, skeleton.dtype)
    heads = embedding_keys(model, "get_output_embeddings", skeleton)
    embeddings = embedding_keys(model, "get_input_embeddings", skeleton)
    config = Config(
        with_new_head(request.lora, skeleton.keys),
        request.quantization,
        compute.dtype,
        heads,
        embeddings,
        request.also_quantize,
        disabled=request.disabled,
        stored=stored,
        kept=kept - heads - embeddings,
    )
    call = example_call(model, skeleton, request)
    signature = call.signature(training=request.training)
    capture, result = compile_call(skeleton, config, call, signature)
    base = Base(skeleton, config, decide(result.flat), result.flat.meta["trained"])
    return Prepared(base, compute, request, signature, capture, result)


def compile_call(
    skeleton: Skeleton,
    config: Config,
    call: Call,
    signature: Signature,
    observe: Observe | None = None,
) -> tuple[Capture, pipeline.Result]:
    """Capture one call and run the pipeline on it.

    Args:
        config: mode, adapter and logits in it are the signature's.

    Raises:
        CaptureError: the model's Python cannot be captured.
        InputError: the call asks for outputs that the model does not return.
    """
    capture = skeleton.capture(
        call.values, training=signature.training, dtype=activation_dtype(skeleton, config)
    )
    check_outputs(capture, call.values, skeleton.model)
    config = config.with_(
        training=signature.training, adapter=signature.adapter, return_logits=signature.logits
    )
    result = pipeline.run(
        capture.gm,
        config,
        title=graph_title(signature.training, call.values),
        observe=None if observe is None else partial(observe, capture),
    )
    return capture, result


def graph_title(training: bool, values: Mapping[str, Any]) -> str:
    names = sorted(n for n, v in values.items() if isinstance(v, torch.Tensor))
    return f"{'train' if training else 'eval'}-{'-'.join(names)}"


def decide(flat: fx.GraphModule) -> dict[str, Verdict]:
    """The verdicts of the first capture, by name; FLOPs of a linear called several times are added up."""
    decided: dict[str, Verdict] = {}
    for verdict in verdicts(flat.graph):
        before = decided.get(verdict.name)
        if before is not None:
            # Of a weight that is read both ways the site counts: it may have an adapter.
            of_site = isinstance(verdict, Site) and not isinstance(before, Site)
            verdict = replace(verdict if of_site else before, flops=before.flops + verdict.flops)
        decided[verdict.name] = verdict
    return decided


def embedding_keys(model: PreTrainedModel, getter: str, skeleton: Skeleton) -> frozenset[str]:
    """Store keys of the tensors of the input or the output embedding; vision and speech models have none."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return frozenset()
    if not isinstance(module, nn.Module):
        return frozenset()
    wanted = {id(p) for p in module.parameters()}
    return frozenset(skeleton.keys[name] for name, t in named_tensors(model) if id(t) in wanted)


def example_call(model: PreTrainedModel, skeleton: Skeleton, request: Request) -> Call:
    """The call to capture first: the user's example, or one made from the model's signature."""
    inputs = request.example_inputs
    if inputs is None:
        make = example_inputs if request.training else example_prompt
        inputs = make(model, skeleton.signature, skeleton.device)
    return skeleton.bind((), inputs)
