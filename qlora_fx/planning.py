"""``plan``: how much memory a training step will take, known from the config alone, before any is spent."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import fx, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from . import blank
from .blank import build, read_config, settle_dtype
from .budget import Budget, Calls, Split, check_budget
from .errors import ConfigError
from .footprint import Footprint, footprint, state_bytes
from .passes.compiled import Key
from .passes.live import peak, size_of, value
from .passes.lower import lower
from .prepare import Prepared, check_settings, prepare
from .runtime.optimizer import PIECE
from .source import find

GB = 10**9
UPDATE = 4
"""Float32 temporaries, each of one piece of the flat buffer, that an update of 32-bit state takes on a CPU."""


@dataclass(frozen=True)
class Moment:
    """One place of a training step.

    Attributes:
        place: ``forward model.layers.3``, ``backward model.layers.3``, ``optimizer``.
        held: bytes of activations that wait for backward.
        working: bytes that live only here, at their most.
    """

    place: str
    held: int
    working: int

    @property
    def live(self) -> int:
        return self.held + self.working


@dataclass(frozen=True)
class Plan:
    """Bytes of a training step, by kind, at its most. Printable.

    Attributes:
        model: the class's name.
        settings: what the plan is for: ``batch_size``, ``sequence_length``, ``r``, ``optimizer``, ``memory_budget``,
            ``dtype``.
        footprint: what is held all the time.
        timeline: the step's places in order.
        split: which calls are recomputed, and what that costs.
        limit: the memory it was fitted to, in bytes, or None.
        changed: what ``fit`` changed of the settings asked for, in words.
    """

    model: str
    settings: dict[str, Any]
    footprint: Footprint
    timeline: list[Moment]
    split: Split
    limit: int | None = None
    changed: list[str] = field(default_factory=list)

    @property
    def storage(self) -> int:
        """Weights in 4 bits and their absmax."""
        return self.footprint.storage

    @property
    def constants(self) -> int:
        """Embeddings, head, norms, biases, buffers."""
        return self.footprint.constants

    @property
    def adapters(self) -> int:
        return self.footprint.adapters

    @property
    def gradients(self) -> int:
        return self.footprint.gradients

    @property
    def optimizer(self) -> int:
        """Optimizer state. On CUDA it is paged: under pressure the driver moves it to the host."""
        return self.footprint.optimizer

    @property
    def highest(self) -> Moment:
        """The place of the peak."""
        return max(self.timeline, key=lambda moment: moment.live)

    @property
    def activations(self) -> int:
        """Held for backward at the peak."""
        return self.highest.held

    @property
    def workspace(self) -> int:
        """What lives only at the place of the peak: dequantized weights, results on their way, logits."""
        return self.highest.working

    @property
    def peak(self) -> int:
        return self.footprint.total + self.highest.live

    @property
    def recomputation(self) -> float:
        """Products computed again under the memory budget, as a part of all."""
        return self.split.recomputation

    def fits(self, memory: int | str) -> bool:
        """Whether the peak is at most ``memory``: bytes, or ``"24GB"``."""
        return self.peak <= memory_of(memory)

    def methods(self) -> dict[str, int]:
        """Peaks of other ways to train the same model on the same batch, in bytes.

        ``full``: 16-bit weights and gradients and two float32 moments, 12 bytes a parameter, the count behind the
        780 GB that QLoRA (arXiv:2305.14314) gives for 65B; ``lora``: 16-bit weights; ``qlora``: this plan.
        Activations are counted alike in all.
        """
        base = 2 * self.footprint.parameters
        step = self.highest.live
        trained = self.adapters + self.gradients + self.optimizer
        return {
            "full": 6 * base + step,
            "lora": base + trained + step,
            "qlora": self.peak,
        }

    def __str__(self) -> str:
        s = self.settings
        held = self.footprint
        bits = 8 * held.storage / held.weights if held.weights else 0.0
        rows = [
            ("storage", self.storage, f"{held.weights / 1e9:.3g}B weights at {bits:.3f} bits"),
            ("constants", self.constants, "embeddings, head, norms, buffers"),
            ("adapters", self.adapters, f"{held.trained / 1e6:.1f}M parameters, r={s['r']}"),
            ("gradients", self.gradients, ""),
            ("optimizer", self.optimizer, s["optimizer"]),
            ("activations", self.activations, self.how_held()),
            ("workspace", self.workspace, f"at {self.highest.place}"),
        ]
        lines = [
            f"{self.model}, {s['batch_size']} x {s['sequence_length']} tokens, {s['dtype']}: one training step",
            "",
        ]
        lines += [f"  {name:12} {size / GB:9.3f} GB  {note}".rstrip() for name, size, note in rows]
        lines += [f"  {'peak':12} {self.peak / GB:9.3f} GB", ""]
        if self.limit is not None:
            lines.append(
                f"fits {self.limit / GB:g} GB" + (":" if self.changed else " as asked for")
            )
            lines += [f"  {change}" for change in self.changed]
        else:
            lines += self.advice()
        return "\n".join(lines)

    def how_held(self) -> str:
        again = [c for c in self.split.bodies if c.recomputed]
        if not again:
            return "everything kept"
        count = ", ".join(f"{c.recomputed} of {c.calls} {c.name}" for c in again)
        return f"{count} recomputed: {self.recomputation:.0%} of products twice"

    def advice(self) -> list[str]:
        """Which common sizes it fits, and what to change for the next smaller one."""
        sizes = (8, 12, 16, 24, 32, 40, 48, 80)
        enough = [gb for gb in sizes if self.peak <= gb * GB]
        if not enough:
            return [f"more than {sizes[-1]} GB; plan(..., fit='{sizes[-1]}GB') says what would fit"]
        smaller = [gb for gb in sizes if gb < enough[0]]
        more = f"; plan(..., fit='{smaller[-1]}GB') says what would fit there" if smaller else ""
        return [f"fits {enough[0]} GB{more}"]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw live bytes along the step as a PNG (needs matplotlib)."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
        kinds = ["storage", "constants", "adapters", "gradients", "optimizer"]
        steps = range(len(self.timeline))
        layers = [[getattr(self, kind) / GB] * len(steps) for kind in kinds]
        layers += [[m.held / GB for m in self.timeline], [m.working / GB for m in self.timeline]]
        colors = ["#33475b", "#6b7f94", "#9fb1c4", "#c5d0dc", "#dfe6ee", "#e09f3e", "#9e2a2b"]
        names = [*kinds, "activations", "workspace"]
        axes.stackplot(steps, layers, labels=names, colors=colors, step="mid")
        at = self.timeline.index(self.highest)
        axes.annotate(
            f"{self.peak / GB:.2f} GB at {self.highest.place}",
            (at, self.peak / GB),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
        axes.set_ylim(0, 1.15 * self.peak / GB)
        axes.set_xlim(0, max(1, len(self.timeline) - 1))
        ticks = list(range(0, len(self.timeline), max(1, len(self.timeline) // 8)))
        labels = [self.timeline[i].place for i in ticks]
        axes.set_xticks(ticks, labels, rotation=30, ha="right", fontsize=7)
        axes.set_ylabel("GB")
        axes.set_title(str(self).splitlines()[0], fontsize=9)
        axes.legend(loc="lower right", fontsize=7, ncols=4)
        figure.savefig(path, dpi=130)
        plt.close(figure)


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
        sizes = self.sizes(batch_size, sequence_length)
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

    def sizes(self, batch_size: int, sequence_length: int) -> dict[Any, int]:
        """The capture's symbols for a batch: all rows, encoder's and decoder's, have ``sequence_length``."""
        found: dict[Any, int] = {}
        for node in self.prepared.result.gm.graph.find_nodes(op="placeholder"):
            if "input" not in node.meta:
                continue
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found.setdefault(size.node.expr, sequence_length if dim else batch_size)
        return found

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
    partition = calls.body.partitioned(Key(calls.body.flowing, recompute))
    forward, backward = (peak(events, sizes) for events in partition.live)
    return (calls.inputs if recompute else calls.held), forward, backward


def memory_of(memory: int | str) -> int:
    """Bytes of ``"24GB"`` or a number.

    Raises:
        ConfigError: for anything else.
    """
    if isinstance(memory, (int, str)):
        try:
            found = check_budget(memory)
        except ConfigError:
            found = None
        if isinstance(found, int):
            return found
    raise ConfigError(f"fit={memory!r}; accepted: bytes as an int, or as '24GB' or '22 GiB'")


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
    bytes are read off those graphs and the rules of 4-bit storage. Counted is what PyTorch allocates for tensors,
    as ``torch.cuda.max_memory_allocated`` does, not the process's libraries and compiled code. The graphs are
    those of a CPU; on a GPU attention holds the same tensors, and what its kernels take beside them is not seen.

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
    from .fit import search

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
