"""Fill the store of a base from a checkpoint, tensor by tensor in the order of its files.

What is held beside the store: one piece (2 MB) of a weight that is quantized as it is stored; one dense tensor
where the file's order is not the storage's (Conv1D, fused experts); one expert of a stack that a checkpoint has in
parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from ..errors import CheckpointError
from ..passes.graph.site import Layout, Site
from ..runtime.parameter_store import QuantizedShape
from ..runtime.schemes import Builder, scheme_of
from ..weights.base import Base
from ..weights.move import add_dense, add_tables
from .conversion import Group
from .four_bit import StoredWeight, bitsandbytes_layout
from .open import Checkpoint


def fill(base: Base, checkpoint: Checkpoint, *, progress: bool) -> None:
    """Read every tensor once.

    Raises:
        CheckpointError: a file ended early, or has values that are not finite.
    """
    filler = Filler(base, checkpoint)
    total = sum(checkpoint.bytes_of(group) for group in checkpoint.groups)
    with tqdm(
        total=total,
        desc="Loading to 4 bits",
        unit="B",
        unit_scale=True,
        disable=None if progress else True,  # None: only where there is a terminal
    ) as bar:
        for group in checkpoint.groups:
            filler.put(group)
            bar.update(checkpoint.bytes_of(group))
    filler.finish()


class Filler:
    """Puts tensors where the store wants them.

    Args:
        base: its store is filled here.
        checkpoint: what is read.
    """

    def __init__(self, base: Base, checkpoint: Checkpoint) -> None:
        self.base = base
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.keys = base.skeleton.keys
        self.sites = base.quantized_sites()

    def put(self, group: Group) -> None:
        """Read one group into the store."""
        weight = self.checkpoint.stored.get(group.first)
        if weight is not None:
            self.stored(group, weight)
        elif group.single is not None and self.checkpoint.gguf is None:
            self.single(group)
        elif group.experts:
            self.experts(group)
        else:
            for name, tensor in group.convert(self.checkpoint.read, self.model).items():
                self.whole(group, name, tensor)

    # -- what arrives dense ---------------------------------------------------------------------------

    def single(self, group: Group) -> None:
        """One tensor that only changes its name: read in pieces, in the storage's order where that is the file's."""
        assert group.single is not None
        name, key = group.first, self.keys[group.first]
        site = self.sites.get(key)
        old = self.parameter(name)
        if site is not None and site.layout.plain and not site.experts:
            builder = self.builder(site)
            pieces = self.checkpoint.shards.pieces(group.single)
            builder.add(0, (piece.to(old.dtype) for piece in pieces))
            self.add_quantized(group, name, site, builder)
        elif site is None:
            self.add_dense(group, name, self.dense(group.single, old))
        else:
            self.whole(group, name, self.checkpoint.read(group.single))

    def dense(self, source: str, old: torch.Tensor) -> torch.Tensor:
        """A tensor in the dtype of ``old`` on the model's device; only a piece is held besides."""
        shards, device = self.checkpoint.shards, self.base.device
        if shards.entries[source].dtype == old.dtype and device.type == "cpu":
            return shards.read(source)
        new = torch.empty(old.shape, dtype=old.dtype, device=device)
        flat, at = new.reshape(-1), 0
        for piece in shards.pieces(source):
            flat[at : at + piece.numel()].copy_(piece)
            at += piece.numel()
        return new

    def whole(self, group: Group, name: str, tensor: torch.Tensor) -> None:
        """A dense parameter that was made as a whole."""
        site = self.sites.get(self.keys[name])
        old = self.parameter(name)
        if tensor.shape != old.shape:
            raise CheckpointError(
                f"{self.checkpoint.where(group)} makes {name} {list(tensor.shape)}; the model's is {list(old.shape)}"
            )
        if site is None:
            self.add_dense(group, name, tensor.to(self.base.device, old.dtype).contiguous())
            return
        builder = self.builder(site)
        weight = site.layout.of(tensor)
        for i in range(builder.matrices):
            builder.add(i, self.matrix(weight[i] if site.experts else weight, old.dtype))
        self.add_quantized(group, name, site, builder)

    def experts(self, group: Group) -> None:
        """A stack that the checkpoint has matrix by matrix: each is converted and quantized by itself."""
        count = group.experts
        builders: dict[str, Builder] = {}
        stacks: dict[str, torch.Tensor] = {}
        for i in range(count):
            for name, one in group.convert(self.checkpoint.read, self.model, i).items():
                old = self.parameter(name)
                site = self.sites.get(self.keys[name])
                layout = None if site is None else matrix_layout(site.layout, count)
                if site is not None and layout is not None:
                    builder = (
                        builders.setdefault(name, self.builder(site)) if i == 0 else builders[name]
                    )
                    builder.add(i, self.matrix(layout.of(one[0]), old.dtype))
                else:
                    if i == 0:
                        stacks[name] = torch.empty(old.shape, dtype=old.dtype)
                    stacks[name][i].copy_(one[0])
        for name, builder in builders.items():
            self.add_quantized(group, name, self.sites[self.keys[name]], builder)
        for name in list(stacks):
            self.whole(group, name, stacks.pop(name))

    def matrix(self, matrix: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The elements of ``[out, in]`` in ``dtype``, in pieces for a builder."""
        for piece in self.base.scheme.pieces(matrix):
            yield piece.to(dtype)

    def builder(self, site: Site) -> Builder:
        return self.base.scheme.builder(site.shape, self.base.device)

    # -- what arrives in 4 bits -----------------------------------------------------------------------

    def stored(self, group: Group, weight: StoredWeight) -> None:
        """Storage as it is in the file where the graph reads it so, else the dense weight it stands for."""
        name = group.first
        settings = self.checkpoint.settings.quantization
        assert settings is not None
        parts = weight.read(self.checkpoint.shards, settings)
        parts = {part: tensor.to(self.base.device) for part, tensor in parts.items()}
        site = self.sites.get(self.keys[name])
        old = self.parameter(name)
        layout = self.layout_of(name, weight, site, old)
        if site is not None and site.layout == layout:
            described = QuantizedShape(site.shape, weight.dtype, self.base.scheme)
            self.base.store.add_quantized(self.keys[name], parts, described)
            return
        why = (
            "nothing in the graph multiplies by it"
            if site is None
            else "the graph reads it transposed"
        )
        warnings.warn(
            f"{weight.key} is in 4 bits in {self.checkpoint.file_of(weight.key)}, and {why}: it is held "
            f"{'dense' if site is None else 'in 4 bits again, quantized anew'}",
            stacklevel=4,
        )
        dense = scheme_of(settings).dequantize(parts, weight.shape, old.dtype)
        self.whole(group, name, layout.inverse(dense).reshape(old.shape).cpu())

    def layout_of(
        self, name: str, weight: StoredWeight, site: Site | None, old: torch.Tensor
    ) -> Layout:
        """The order in which the file has the parameter ``name``."""
        if weight.own:
            if site is None or site.shape != weight.shape:
                raise CheckpointError(
                    f"{weight.key} in {self.checkpoint.file_of(weight.key)} is in 4 bits as {list(weight.shape)}; "
                    f"this model reads it as {list(site.shape) if site is not None else 'a dense tensor'}. Load it "
                    "with the model class and settings it was saved with"
                )
            return site.layout
        owner = self.model.get_submodule(name.rpartition(".")[0])
        return bitsandbytes_layout(tuple(old.shape), type(owner).__name__ == "Conv1D")

    # -- the store ------------------------------------------------------------------------------------

    def parameter(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.model.get_parameter_or_buffer(name)
        return tensor

    def add_quantized(self, group: Group, name: str, site: Site, builder: Builder) -> None:
        if not builder.finite:
            raise self.not_finite(group, name)
        old, key = self.parameter(name), self.keys[name]
        self.base.store.add_quantized(
            key, builder.parts, QuantizedShape(site.shape, old.dtype, self.base.scheme)
        )

    def add_dense(self, group: Group, name: str, tensor: torch.Tensor) -> None:
        if (
            tensor.is_floating_point()
            and not torch.isfinite(tensor.sum())
            and not torch.isfinite(tensor).all()
        ):
            raise self.not_finite(group, name)
        path, _, leaf = name.rpartition(".")
        key = self.keys[name]
        add_dense(self.base.store, key, tensor, self.model.get_submodule(path), leaf)

    def not_finite(self, group: Group, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.checkpoint.where(group)} has values that are NaN or infinite; quantizing would spread them "
            f"over whole blocks of {name}. Check the checkpoint"
        )

    def finish(self) -> None:
        """Move what transformers made itself (buffers that no checkpoint holds), and share the maps."""
        for name, key in self.keys.items():
            if key not in self.base.store:
                path, _, leaf = name.rpartition(".")
                module: Any = self.model.get_submodule(path)
                tensor = getattr(module, leaf)
                add_dense(self.base.store, key, tensor, module, leaf)
        add_tables(self.base)


def matrix_layout(layout: Layout, count: int) -> Layout | None:
    """The layout of each matrix of a stack, where the stack's own dimension is the first throughout."""
    if len(layout.shape) != 3 or layout.view[0] != count or layout.permute[0] != 0:
        return None
    return Layout(layout.view[1:], tuple(i - 1 for i in layout.permute[1:]), layout.shape[1:])
