"""``plan``: how much memory a training step will take, known from the config alone, before any is spent."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import fx, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from ..checkpoints import empty_model as blank
from ..checkpoints.empty_model import build, read_config, settle_dtype
from ..checkpoints.locate import find
from ..compiler.compile import Prepared, check_settings, prepare
from ..errors import ConfigError
from ..passes.lower import lower
from ..passes.lowering.compiled_body import Key
from ..passes.lowering.live_bytes import events, peak, size_of, value
from ..runtime.optimizer import PIECE
from .fit import search
from .recompute import Budget, Calls, Split, free_sizes, memory_of
from .report import Moment, Plan
from .resident import footprint, state_bytes

UPDATE = 4
"""Float32 temporaries, each of one piece of the flat buffer, that an update of 32-bit state takes on a CPU."""


@dataclass
class Draft:
    """A model that is prepared for planning: traced once, evaluated for any sizes.

    Attributes:
        prepared: without weights.
        outer: the lowered program.
    """

    prepared: Prepared
    outer: fx.GraphModule

    def plan(
        self, *, batch_size: int, sequence_length: int, optimizer: str, memory_budget: Any
    ) -> Plan:
        nodes = self.prepared.result.gm.graph.find_nodes(op="placeholder")
        inputs = [n.meta["val"] for n in nodes if "input" in n.meta]
        sizes = free_sizes(inputs, batch_size, sequence_length)
        device = self.prepared.blueprint.device
        asked = 1.0 if memory_budget is None else memory_budget
        split = Budget(self.outer, asked, device).split(sizes)
        held = footprint(self.prepared, optimizer)
        config = self.prepared.config
        settings = {
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "r": config.lora.r,
            "optimizer": optimizer,
            "memory_budget": memory_budget,
            "dtype": str(config.compute_dtype).removeprefix("torch."),
        }
        timeline = self.timeline(split, sizes)
        flat = held.adapters // 4
        timeline.append(Moment("optimizer", 0, 4 * UPDATE * min(PIECE, flat)))
        name = type(self.prepared.blueprint.model).__name__
        return Plan(name, settings, held, timeline, split)

    def timeline(self, split: Split, sizes: Mapping[Any, int]) -> list[Moment]:
        """Forward through the program's calls, and back."""
        known = {calls.name: calls for calls in split.bodies}
        numbers: dict[str, int] = {}
        steps: list[
            tuple[str, int, int, int]
        ] = []  # place, held, forward's and backward's working bytes
        memo: dict[Any, tuple[int, int, int]] = {}
        for node in self.outer.graph.nodes:
            if node.op != "call_module":
                continue
            calls = known[str(node.target)]
            number = numbers[calls.name] = numbers.get(calls.name, -1) + 1
            key = (calls.name, number < calls.recomputed)
            if key not in memo:
                memo[key] = working(calls, key[1], sizes)
            place = str(node.meta.get("module") or calls.name)
            steps.append((place, *memo[key]))
        moments = []
        held = self.shared(sizes)
        for place, own, ahead, _ in steps:
            moments.append(Moment(f"forward {place}", held, ahead))
            held += own
        for place, own, _, back in reversed(steps):
            held -= own
            if back:
                # What this call saved is freed as its backward goes on: counted in its working bytes.
                moments.append(Moment(f"backward {place}", held, back))
        return moments

    def shared(self, sizes: Mapping[Any, int]) -> int:
        """Bytes that several calls read, and live through the step: masks and rotary tables.

        What one call reads is counted with what that call saves.
        """
        nodes = [n for n in self.outer.graph.nodes if n.op == "call_module" or is_item(n)]
        several = [n for n in nodes if len([u for u in n.users if not is_item(u)]) > 1]
        return sum(value(size_of(n), sizes) for n in several)


def is_item(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem


def working(calls: Calls, recompute: bool, sizes: Mapping[Any, int]) -> tuple[int, int, int]:
    """Bytes that a call leaves for backward, and the most it has live in forward and in backward."""
    body = calls.body
    if not any(body.flowing):  # nothing below an adapter is split
        return 0, peak(events(body.body.graph, ()), sizes), 0
    partition = body.partitioned(Key(body.flowing, recompute))
    forward, backward = (peak(changes, sizes) for changes in partition.live)
    return (calls.inputs if recompute else calls.held), forward, backward


def draft(model: Any, settings: Any) -> Draft:
    """Trace a model without weights up to its split program. On a CPU, whatever it is planned for."""
    prepared = prepare(model, settings, torch.device("cpu"))
    return Draft(prepared, lower(prepared.result.gm, backend="aot_eager"))


def plan(
    source: Any,
    lora: LoraConfig | None = None,
    quantization: BitsAndBytesConfig | None = None,
    *,
    batch_size: int = 1,
    sequence_length: int = 512,
    optimizer: str = "PagedAdamW32bit",
    memory_budget: int | float | str | None = None,
    fit: int | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
    compute_dtype: torch.dtype | str | None = torch.bfloat16,
    blocksize: int = 64,
    also_quantize: Iterable[str] = (),
    model_class: Any = None,
    revision: str | None = None,
    token: str | None = None,
) -> Plan:
    """How much memory one training step takes, from the config alone: no weights, no GPU.

    The model is traced on fake tensors, rewritten and split into forward and backward as ``transform`` does it;
    bytes are read off those graphs and the rules of 4-bit storage. Counted are tensors: what
    ``torch.cuda.max_memory_allocated`` gives, and paged optimizer state, which is not in that. Libraries, compiled
    code and the scratch that kernels take for themselves are not. The graphs are those of a CPU; on a GPU attention
    holds the same tensors.

    Args:
        source: a folder or hub id (only config.json is read), a ``transformers.PretrainedConfig``, or a model.
        lora, quantization, compute_dtype, blocksize, also_quantize: as for ``transform``; both dtypes are bfloat16
            unless given.
        batch_size, sequence_length: of the training batch; every token gives loss.
        optimizer: as for ``QLoRAModel.paged_optimizer``.
        memory_budget: as for ``transform``; None keeps everything.
        fit: memory the peak shall fit, as bytes or "24GB". What has to give is changed, cheapest loss of speed
            first: the memory budget, the optimizer to 8 bits, the batch, the rank, the sequence.
        dtype: of the model's 16- or 32-bit weights.
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
    state_bytes(optimizer, 0)  # a name that is not known
    limit = None if fit is None else memory_of(fit)
    settings = check_settings(
        lora,
        quantization,
        compute_dtype=compute_dtype,
        blocksize=blocksize,
        also_quantize=also_quantize,
        example_inputs=None,
        memory_budget=memory_budget,
        disable=(),
        backend="aot_eager",
    )
    model = model_of(source, dtype, model_class, revision, token)
    first = draft(model, settings)
    asked: dict[str, Any] = {
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "optimizer": optimizer,
        "memory_budget": settings.memory_budget,
    }
    if limit is None:
        return first.plan(**asked)
    return search(first, asked, limit, lambda lower: draft(model, settings.with_(lora=lower)))


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
    settled = settle_dtype(config, dtype, ())
    model = build(config, blank.model_class(config, kind), settled)
    model.tie_weights()
    return model
