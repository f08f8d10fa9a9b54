"""A ``Plan``: bytes of a training step by kind and by place, to read, to print and to draw."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from ..compiler.recompute import Split
from ..units import parse_size
from .resident import Footprint

GB = 10**9


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
        return self.peak <= parse_size(memory, "memory")

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
