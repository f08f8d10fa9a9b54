"""A base: the model's Python, its verdicts and its weights, which loading, saving, merging and running share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..capture.skeleton import Skeleton
from ..config import Config
from ..passes.adapters import Adapter, adapter_of
from ..passes.graph.site import Site, Verdict
from ..runtime.parameter_store import Store
from ..runtime.schemes import Scheme, scheme_of


@dataclass(frozen=True)
class Origin:
    """Where weights came from.

    Attributes:
        folder: with the files that lie beside the weights.
        gguf: the file, where they came from one.
    """

    folder: Path
    gguf: Path | None = None


@dataclass
class Base:
    """A model in 4 bits as data; ``QLoRAModel`` is what runs it.

    Attributes:
        skeleton: its Python, keys and signature.
        config: what was asked of the passes.
        verdicts: the verdict on each operation with a weight, by name, in the order of the graph.
        store: its weights and, once there are any, its adapters.
        trained: the tensor that each copy that trains beside the adapters is of, by store key of the copy.
        origin: where the weights were loaded from; None for a model that was transformed in memory.
    """

    skeleton: Skeleton
    config: Config
    verdicts: Mapping[str, Verdict]
    trained: Mapping[str, str] = field(default_factory=dict)
    store: Store = field(default_factory=lambda: Store(nn.Module()))
    origin: Origin | None = None

    @cached_property
    def sites(self) -> dict[str, Site]:
        """The linears that the passes know, quantized and adapted or not."""
        return {name: v for name, v in self.verdicts.items() if isinstance(v, Site)}

    @property
    def device(self) -> torch.device:
        return self.skeleton.device

    @property
    def activation_dtype(self) -> torch.dtype:
        """Dtype of activations and logits."""
        return activation_dtype(self.skeleton, self.config)

    @property
    def decided_config(self) -> Config:
        """For captures after the first: the sites of the first hold."""
        return self.config.with_(decided=self.sites, trained=frozenset(self.trained))

    @property
    def folder(self) -> Path | None:
        """The folder the model came from, if it is known and here."""
        if self.origin is not None:
            return self.origin.folder
        named = getattr(self.skeleton.model.config, "name_or_path", None) or ""
        return Path(named) if named and Path(named).is_dir() else None

    @property
    def scheme(self) -> Scheme:
        """How its quantized weights are stored; there is none with ``quantization=False``."""
        return scheme_of(self.config.quantization)

    @property
    def adapter(self) -> Adapter:
        """The kind of adapter that its adapted sites have."""
        return adapter_of(self.config.lora, self.config.slots)

    def quantized_sites(self) -> dict[str, Site]:
        """One site per quantized weight, by store key."""
        return {site.weight: site for site in self.sites.values() if site.quantize}


def activation_dtype(skeleton: Skeleton, config: Config) -> torch.dtype:
    """The wider of the model's dtype and the compute dtype; of the two 16-bit ones that with the larger range."""
    both = {skeleton.dtype, config.compute_dtype}
    if both == {torch.float16, torch.bfloat16}:
        return torch.bfloat16
    return torch.promote_types(skeleton.dtype, config.compute_dtype)
