"""``merge``: the adapter into the weights, as an ordinary checkpoint, one tensor at a time."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.conversion import Group, plan_back, results
from ..checkpoints.locate import find
from ..checkpoints.open import open_checkpoint
from ..checkpoints.save import saved_names, write_beside, write_config, write_quantized
from ..errors import CheckpointError, ConfigError
from ..explain import numbers
from ..runtime.checkpoint_writer import FolderWriter, Spec
from ..units import parse_size
from ..weights.base import Base
from .logit_drift import Drift, measure, sample_inputs
from .values import MODES, Merged, OriginalWeights

log = logging.getLogger("qlora_fx")


@dataclass(frozen=True)
class MergeReport:
    """What merging changes. Printable.

    Attributes:
        mode: how the adapter was merged.
        errors: relative error (Frobenius) of each weight beside what was trained, by parameter name: rounding to
            the model's dtype, and in "base16" and "requantized" what quantization does.
        drift: of the logits; None where it was not asked for.
        folder: where it was saved; None if it was only measured.
    """

    mode: str
    errors: dict[str, float] = field(default_factory=dict)
    drift: Drift | None = None
    folder: Path | None = None

    def __str__(self) -> str:
        groups: dict[tuple[str, ...], list[str]] = {}
        for name in self.errors:
            pattern = tuple("*" if part.isdigit() else part for part in name.split("."))
            groups.setdefault(pattern, []).append(name)
        lines = [f"merged, {self.mode}; relative error beside what was trained:"]
        for pattern, names in groups.items():
            errors = [self.errors[n] for n in names]
            parts = [n.split(".") for n in names]
            shown = ".".join(
                part if part != "*" else numbers(sorted({int(p[i]) for p in parts}))
                for i, part in enumerate(pattern)
            )
            lines.append(f"  {shown}: {sum(errors) / len(errors):.2e}, at most {max(errors):.2e}")
        lines.append(
            str(self.drift) if self.drift is not None else "logits: not compared (sample=False)"
        )
        return "\n".join(lines)


def merge(
    base: Base,
    run: Callable[..., Any],
    folder: str | os.PathLike[str] | None,
    *,
    mode: str,
    original: str | os.PathLike[str] | None,
    sample: Any,
    max_shard_size: int | str,
) -> MergeReport:
    """See ``QLoRAModel.merge``.

    Args:
        run: the model with its adapter, in eval mode.
        original: ``base`` there.
    """
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}; accepted: {', '.join(map(repr, MODES))}")
    if mode == "requantized" and base.trained:
        raise ConfigError(
            f"mode='requantized' keeps the base's dense tensors, and {next(iter(base.trained.values()))} and "
            "others were trained (bias, modules_to_save); accepted: 'dequantized', 'base16'"
        )
    limit = parse_size(max_shard_size, "max_shard_size")
    opened = open_original(base, original) if mode == "base16" else contextlib.nullcontext()
    with opened as weights:
        merged = Merged(base, mode, weights)
        drift = None
        if sample is not False:
            inputs, words = sample_inputs(base.skeleton, sample, base.folder)
            drift = measure(run, merged, inputs, words)
        names = saved_names(base)
        by_key = {key: name for name, key in names.items()}
        touched = [k for k in by_key if k in merged.sites or k in merged.adapted]
        for key in touched:
            if key not in merged.errors:  # not every module runs on every input
                merged.parameter(by_key[key])
        report = MergeReport(mode, {by_key[k]: merged.errors[k] for k in touched}, drift)
        log.info("%s", report)
        if folder is None:
            return report
        if mode == "requantized":
            write_quantized(base, folder, limit, merged.requantized)
        else:
            write_dense(base, folder, limit, merged, names)
    return MergeReport(mode, report.errors, drift, Path(folder))


def write_dense(
    base: Base,
    folder: str | os.PathLike[str],
    limit: int,
    merged: Merged,
    names: dict[str, str],
) -> None:
    """An ordinary checkpoint in the model's dtype; one conversion's tensors are held at a time."""
    model = base.skeleton.model
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}
    groups = plan_back(model, names)
    made = [results(group, model, shapes) for group in groups]
    with FolderWriter(folder) as writer:
        write_config(base, writer, None)
        writer.tensors(
            [Spec(n, t.dtype, tuple(t.shape)) for tensors in made for n, t in tensors.items()],
            max_shard_size=limit,
        )
        for group, tensors in zip(groups, made, strict=True):
            for name, tensor in pieces(group, list(tensors), merged):
                writer.put(name, tensor)
        write_beside(base, writer)


def pieces(group: Group, targets: list[str], merged: Merged) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that a group writes; of a stack that is written matrix by matrix, of one at a time."""
    model = merged.model
    count = group.split_experts(model)
    if not count:
        yield from group.convert(merged.parameter, model).items()
        return
    for i in range(count):

        def matrix(name: str, i: int = i) -> torch.Tensor:
            return merged.parameter(name, i)[None]

        one = group.convert(matrix, model)
        for j, tensor in enumerate(one.values()):
            yield targets[j * count + i], tensor


@contextlib.contextmanager
def open_original(base: Base, source: str | os.PathLike[str] | None) -> Iterator[OriginalWeights]:
    """The original 16-bit checkpoint, opened and compared with the model.

    Raises:
        ConfigError: it is not known.
        CheckpointError: it is in 4 bits, or of another model.
    """
    if source is None:
        source = base.folder if base.origin is None else base.origin.gguf or base.origin.folder
    if source is None:
        raise ConfigError(
            "mode='base16' needs the original checkpoint; pass base=, a folder or a hub id"
        )
    model = base.skeleton.model
    with open_checkpoint(
        find(source), dtype=base.skeleton.dtype, kind=type(model), device=base.device
    ) as checkpoint:
        if checkpoint.stored:
            raise CheckpointError(
                f"{os.fspath(source)!r} is in 4 bits; mode='base16' needs the original checkpoint: pass base=, or use "
                "mode='dequantized'"
            )
        weights = OriginalWeights(checkpoint)
        compare(base, weights, os.fspath(source))
        yield weights


TOLERANCE = 0.02
"""Relative error between two quantizations of one weight: devices and releases of bitsandbytes round a tie in a
thousand differently. Quantizing itself costs 0.09."""


def compare(base: Base, weights: OriginalWeights, source: str) -> None:
    """Quantize the first and the last weight again and compare with what is held.

    Raises:
        CheckpointError: they are of another model.
    """
    names, scheme = {key: name for name, key in saved_names(base).items()}, base.scheme
    sites = list(base.quantized_sites().values())
    for site in {s.weight: s for s in (sites[:1] + sites[-1:])}.values():
        name = names[site.weight]
        dtype = base.skeleton.dtypes[name]
        dense = site.layout.of(weights.read(name).to(base.device, dtype))
        new, held = scheme.quantize(dense), base.store.parts(site.weight)
        if site.experts:  # the first tells
            new, held = scheme.matrix(new, 0), scheme.matrix(held, 0)
        del dense
        distance = norm = 0.0
        both = (scheme.rows(parts, site.shape[-2:]) for parts in (new, held))
        for one, other in zip(*both, strict=True):
            distance += float((one - other).double().square().sum())
            norm += float(other.double().square().sum())
        error = (distance / norm) ** 0.5 if norm else 0.0
        if error > TOLERANCE:
            raise CheckpointError(
                f"{name} of {source!r} is not what this model was quantized from: their 4-bit values differ by "
                f"{100 * error:.0f} %. Pass base= with the original checkpoint"
            )
