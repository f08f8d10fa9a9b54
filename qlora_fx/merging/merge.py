"""``merge``: the adapter into the weights, as an ordinary checkpoint, one tensor at a time."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.conversion import Group, plan_back, results
from ..checkpoints.locate import find
from ..checkpoints.open import open_checkpoint
from ..checkpoints.save import (
    saved_names,
    source_folder,
    write_beside,
    write_config,
    write_quantized,
)
from ..errors import CheckpointError, ConfigError
from ..explain import numbers
from ..model import QLoRAModel
from ..runtime.checkpoint_writer import FolderWriter, Spec, parse_size
from ..runtime.schemes.four_bit import dequantize_rows, quantize_weight
from ..weights.move import quantized_sites
from .logit_drift import Drift, measure, sample_inputs
from .values import MODES, BaseWeights, Merged

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
    qmodel: QLoRAModel,
    folder: str | os.PathLike[str] | None,
    *,
    mode: str,
    base: str | os.PathLike[str] | None,
    sample: Any,
    max_shard_size: int | str,
) -> MergeReport:
    """See ``QLoRAModel.merge``."""
    if mode not in MODES:
        raise ConfigError(f"mode={mode!r}; accepted: {', '.join(map(repr, MODES))}")
    limit = parse_size(max_shard_size)
    with original(qmodel, base) if mode == "base16" else contextlib.nullcontext() as weights:
        merged = Merged(qmodel, mode, weights)
        drift = None
        if sample is not False:
            inputs, words = sample_inputs(qmodel, sample, source_folder(qmodel))
            drift = measure(merged, inputs, words)
        names = saved_names(qmodel)
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
            write_quantized(qmodel, folder, limit, merged.requantized)
        else:
            write_dense(qmodel, folder, limit, merged, names)
    return MergeReport(mode, report.errors, drift, Path(folder))


def write_dense(
    qmodel: QLoRAModel,
    folder: str | os.PathLike[str],
    limit: int,
    merged: Merged,
    names: dict[str, str],
) -> None:
    """An ordinary checkpoint in the model's dtype; one conversion's tensors are held at a time."""
    model = qmodel._blueprint.model
    shapes = {n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}
    groups = plan_back(model, names)
    made = [results(group, model, shapes) for group in groups]
    with FolderWriter(folder) as writer:
        write_config(qmodel, writer, None)
        writer.tensors(
            [Spec(n, t.dtype, tuple(t.shape)) for tensors in made for n, t in tensors.items()],
            max_shard_size=limit,
        )
        for group, tensors in zip(groups, made, strict=True):
            for name, tensor in pieces(group, list(tensors), merged):
                writer.put(name, tensor)
        write_beside(qmodel, writer)


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
def original(qmodel: QLoRAModel, base: str | os.PathLike[str] | None) -> Iterator[BaseWeights]:
    """The original 16-bit checkpoint, opened and compared with the model.

    Raises:
        ConfigError: it is not known.
        CheckpointError: it is in 4 bits, or of another model.
    """
    if base is None:
        base = (
            qmodel._source.gguf or qmodel._source.folder
            if qmodel._source is not None
            else source_folder(qmodel)
        )
    if base is None:
        raise ConfigError(
            "mode='base16' needs the original checkpoint; pass base=, a folder or a hub id"
        )
    model = qmodel._blueprint.model
    with open_checkpoint(
        find(base), dtype=qmodel._blueprint.dtype, kind=type(model), device=qmodel.device
    ) as checkpoint:
        if checkpoint.stored:
            raise CheckpointError(
                f"{os.fspath(base)!r} is in 4 bits; mode='base16' needs the original checkpoint: pass base=, or use "
                "mode='dequantized'"
            )
        weights = BaseWeights(checkpoint)
        compare(qmodel, weights, os.fspath(base))
        yield weights


TOLERANCE = 0.02
"""Relative error between two quantizations of one weight: devices and releases of bitsandbytes round a tie in a
thousand differently. Quantizing itself costs 0.09."""


def compare(qmodel: QLoRAModel, weights: BaseWeights, base: str) -> None:
    """Quantize the first and the last weight again and compare with what is held.

    Raises:
        CheckpointError: they are of another model.
    """
    names = {key: name for name, key in saved_names(qmodel).items()}
    sites = list(quantized_sites(qmodel).values())
    for site in {s.weight: s for s in (sites[:1] + sites[-1:])}.values():
        assert site.layout is not None
        name = names[site.weight]
        dtype = qmodel._blueprint.dtypes[name]
        dense = site.layout.of(weights.read(name).to(qmodel.device, dtype))
        path, _, leaf = site.weight.rpartition(".")
        node: Any = qmodel._store.node(path)
        new, held = quantize_weight(dense, qmodel._config.quantization), node.parts(leaf)
        if site.experts:  # the first tells
            new, held = (
                {k: v if k == "nested_quant_map" else v[0] for k, v in p.items()}
                for p in (new, held)
            )
        del dense
        distance = norm = 0.0
        both = (
            dequantize_rows(p, site.shape[-2:], qmodel._config.quantization) for p in (new, held)
        )
        for one, other in zip(*both, strict=True):
            distance += float((one - other).double().square().sum())
            norm += float(other.double().square().sum())
        error = (distance / norm) ** 0.5 if norm else 0.0
        if error > TOLERANCE:
            raise CheckpointError(
                f"{name} of {base!r} is not what this model was quantized from: their 4-bit values differ by "
                f"{100 * error:.0f} %. Pass base= with the original checkpoint"
            )
