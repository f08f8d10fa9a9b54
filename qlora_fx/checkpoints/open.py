"""A checkpoint that was opened: the model without weights, and a plan for every tensor; no value is held.

Made by ``open_checkpoint``; read by ``load.py`` to fill a store and by ``merging`` for the original weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, ConfigError
from ..runtime.safetensors_reader import Shards
from ..transformers_internals import set_conversions_used
from .conversion import Group, plan, results
from .empty_model import build, choose_dtype, complete, find_class, read_config
from .four_bit import StoredWeight, StoredWeights, find_stored
from .gguf import LazyFile, TensorwiseFile, open_file
from .locate import Source


@dataclass
class Checkpoint:
    """A source, opened.

    Attributes:
        source: where it is.
        model: its model, tied, on the meta device but for what no checkpoint holds.
        shards: its files.
        groups: how its tensors become parameters, in the order of the files.
        stored: its weights in 4 bits, by parameter name.
        settings: of those.
        gguf: where it is a GGUF file.
    """

    source: Source
    model: Any
    shards: Shards
    groups: list[Group] = field(default_factory=list)
    stored: dict[str, StoredWeight] = field(default_factory=dict)
    settings: StoredWeights = field(default_factory=lambda: StoredWeights({}))
    gguf: LazyFile | TensorwiseFile | None = None

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor of the checkpoint."""
        return self.shards.read(name) if self.gguf is None else self.gguf.read(name)

    def file_of(self, name: str) -> Path:
        if self.gguf is not None:
            return self.gguf.path
        return self.shards.entries[name].file

    def bytes_of(self, group: Group) -> int:
        """Bytes of a group's tensors in the files."""
        if self.gguf is not None:
            return sum(self.gguf.bytes_of(name) for name, _ in group.sources)
        return sum(self.shards.entries[name].nbytes for name, _ in group.sources)

    def where(self, group: Group) -> str:
        """A group's tensors and their file, for messages."""
        name = group.sources[0][0]
        more = f" and {len(group.sources) - 1} more" if len(group.sources) > 1 else ""
        return f"{name}{more} in {self.file_of(name)}"


@contextlib.contextmanager
def open_checkpoint(
    source: Source, *, dtype: Any, kind: Any, device: torch.device
) -> Iterator[Checkpoint]:
    """Build the model without weights and plan where every tensor of the source goes.

    Args:
        source: with whole headers.
        dtype: as ``from_pretrained`` takes it.
        kind: the model class, or None for the config's.
        device: where buffers that no checkpoint holds are made.

    Raises:
        ConfigError: no such model class or dtype, or another kind of quantization.
        CheckpointError: tensors are missing, unknown, or of a wrong shape or dtype; nothing was read of them.
    """
    if source.gguf is not None:
        yield open_gguf(source, dtype=dtype, kind=kind, device=device)
        return
    with Shards(source.entries) as shards:
        settings = find_stored(source, shards)
        config = read_config(source)
        chosen = choose_dtype(config, dtype, (e.dtype for e in source.entries.values()))
        model = build(config, find_class(config, kind), chosen, source)
        names = [name for name in source.entries if not settings.belongs(name)]
        mapping: list[Any] | None = [] if any(w.own for w in settings.weights.values()) else None
        groups, unexpected = plan(model, names, mapping)
        if mapping is not None:
            set_conversions_used(model, None)  # what is saved from it has the names of its class
        checkpoint = Checkpoint(source, model, shards, settings=settings)
        produced = check_groups(checkpoint, groups)
        drop_equal_duplicates(checkpoint, groups, produced)
        finish(checkpoint, set(produced), set(unexpected), device)
        places = {e.name: i for i, e in enumerate(source.entries.values())}
        checkpoint.groups = sorted(groups, key=lambda g: places[g.sources[0][0]])
        yield checkpoint


def open_gguf(source: Source, *, dtype: Any, kind: Any, device: torch.device) -> Checkpoint:
    """The same of a GGUF file, with transformers' conversions for it."""
    assert source.gguf is not None
    gguf = open_file(source.gguf)
    config = read_config(source)
    chosen = choose_dtype(config, gguf.dtype if dtype == "auto" else dtype, ())
    model = build(config, find_class(config, kind), chosen, source)
    groups, unexpected = gguf.plan(model, chosen)
    set_conversions_used(model, None)  # what is saved has the model's own names, not the file's
    if unexpected:  # llama.cpp writes tensors that transformers computes (rope_freqs)
        warnings.warn(
            f"{source.gguf} has tensors that the model does not use: {', '.join(unexpected)}",
            stacklevel=2,
        )
    checkpoint = Checkpoint(source, model, Shards({}), groups, gguf=gguf)
    produced = {name for group in groups for name in group.targets(model)}
    finish(checkpoint, produced, set(), device)
    return checkpoint


def check_groups(checkpoint: Checkpoint, groups: list[Group]) -> dict[str, Group]:
    """The parameters that the groups make, after comparing their shapes and dtypes with the model's.

    Raises:
        CheckpointError: naming the tensor and the file of the first that does not fit.
    """
    model, settings = checkpoint.model, checkpoint.settings
    entries = checkpoint.source.entries
    shapes = {name: (e.shape, e.dtype) for name, e in entries.items()}
    expected = model.state_dict()
    produced: dict[str, Group] = {}
    for group in groups:
        arriving = [name for name, _ in group.sources if name in settings.weights]
        if arriving:
            if group.single is None:
                raise CheckpointError(
                    f"{checkpoint.where(group)} are in 4 bits and would have to be converted to {group.first}; "
                    "accepted: a checkpoint that has that weight dense"
                )
            weight = settings.weights[arriving[0]]
            wanted = tuple(expected[group.first].shape)
            if not weight.own and wanted not in (weight.shape, weight.shape[::-1]):
                raise misfit(checkpoint, group, group.first, weight.shape, wanted)
            checkpoint.stored[group.first] = weight
            produced[group.first] = group
            continue
        try:
            made = results(group, model, shapes)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint.where(group)} cannot be converted to {group.first}: {error}"
            ) from error
        for name, tensor in made.items():
            if name not in expected:
                raise CheckpointError(
                    f"{checkpoint.where(group)} makes {name}, which the model has not"
                )
            new, old = tensor, expected[name]
            if new.shape != old.shape:
                raise misfit(checkpoint, group, name, tuple(new.shape), tuple(old.shape))
            wide = new.dtype.itemsize > 1 and new.is_floating_point()
            if (old.is_floating_point() and not wide) or (
                not old.is_floating_point() and new.is_floating_point()
            ):
                accepted = "16-, 32- or 64-bit floats" if old.is_floating_point() else old.dtype
                raise CheckpointError(
                    f"{checkpoint.where(group)} has dtype {new.dtype}; {name} needs {accepted}"
                )
            produced[name] = group
    return produced


def misfit(
    checkpoint: Checkpoint, group: Group, name: str, found: tuple[int, ...], wanted: tuple[int, ...]
) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.where(group)} has shape {list(found)}; {name} of {type(checkpoint.model).__name__} with this "
        f"config.json is {list(wanted)}"
    )


def drop_equal_duplicates(
    checkpoint: Checkpoint, groups: list[Group], produced: dict[str, Group]
) -> None:
    """Where the config ties two weights and the files hold both: tie them if they are equal, else do not.

    transformers compares them when both are loaded; here their bytes in the files are compared.
    """
    model = checkpoint.model
    for target, source in list(model.all_tied_weights_keys.items()):
        if target not in produced or source not in produced:
            continue
        one, other = produced[target], produced[source]
        if one.single is not None and other.single is not None and same(checkpoint, one, other):
            groups.remove(one)
            del produced[target]
            continue
        warnings.warn(
            f"config.json ties {target} to {source}, and {checkpoint.source.name!r} holds both with different "
            "values; they are not tied. Say so with tie_word_embeddings=false in config.json",
            stacklevel=4,
        )
        model.all_tied_weights_keys.pop(target)


def same(checkpoint: Checkpoint, one: Group, other: Group) -> bool:
    entries = checkpoint.source.entries
    assert one.single is not None
    assert other.single is not None
    a, b = entries[one.single], entries[other.single]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    second = Shards(entries)  # a buffer of its own
    with second:
        pairs = zip(checkpoint.shards.pieces(a.name), second.pieces(b.name), strict=True)
        return all(torch.equal(x, y) for x, y in pairs)


def finish(
    checkpoint: Checkpoint, produced: set[str], unexpected: set[str], device: torch.device
) -> None:
    """Tie, complete, and refuse what is missing or has no place.

    Raises:
        CheckpointError: naming the tensors.
    """
    model, source = checkpoint.model, checkpoint.source
    missing = set(model.state_dict()) - produced
    missing, unexpected = complete(model, missing, unexpected, device)
    if missing:
        names = sorted(missing)
        raise CheckpointError(
            f"{source.name!r} lacks {len(names)} tensors of {type(model).__name__}, the first {names[0]}. The "
            "checkpoint is incomplete, or of another model class (model_class=)"
        )
    if unexpected:
        names = sorted(unexpected)
        raise CheckpointError(
            f"{names[0]} in {checkpoint.file_of(names[0])} has no place in {type(model).__name__}"
            + (f", nor have {len(names) - 1} more" if len(names) > 1 else "")
            + ". The checkpoint is of another model class (model_class=), or damaged"
        )
    if not any(t.is_floating_point() for t in model.parameters()):
        raise ConfigError(f"{type(model).__name__} has no floating-point parameter")
