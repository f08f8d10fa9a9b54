"""What the passes need to know; ``compiler/request.py`` makes it from the user's arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig

from .transformers_internals import get_pattern_key

ROLES = ("head", "embeddings", "routers")
"""What stays dense unless ``also_quantize`` names it."""
DEFAULT_RANK = 16
"""Rank used when no ``LoraConfig`` is given; ``lora_alpha`` is then the same, a scaling of 1."""


DENSE = "dense"
"""The ``quant_type`` of ``quantization=False``: plain LoRA."""


@dataclass(frozen=True)
class Quantization:
    """How base weights are stored.

    Attributes:
        quant_type: ``nf4``, ``fp4``, or ``DENSE``.
        blocksize: weights per absmax, 32, 64, 128, ... 4096.
        double_quant: whether the absmax are themselves quantized to 8 bits, in blocks of 256.
        storage_dtype: dtype in which the packed bytes are held (``bnb_4bit_quant_storage``).
        skip: module names that stay dense (``llm_int8_skip_modules``).
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    storage_dtype: torch.dtype = torch.uint8
    skip: tuple[str, ...] = ()

    @property
    def is_dense(self) -> bool:
        """Whether all weights stay as they are."""
        return self.quant_type == DENSE


@dataclass(frozen=True)
class Config:
    """All that the passes need to know. One per capture; ``training`` and ``adapter`` differ.

    Attributes:
        lora: the user's LoRA settings.
        quantization: storage of the base weights.
        compute_dtype: dtype in which linears multiply.
        output_heads: store keys of weights read by the model's output head.
        input_embeddings: store keys of the model's input embedding.
        also_quantize: what is dense by default and is to be quantized all the same: members of ``ROLES``.
        training: whether dropout is active.
        adapter: False builds the quantized model without its adapter.
        return_logits: False lets the loss be computed without its logits.
        disabled: names of stages that are left out.
        decided: for captures after the first, the sites of the first, by name: storage and adapters exist and
            are not decided again. (``passes.graph.site.Site``, which a leaf does not import.)
        trained: for captures after the first, store keys of the copies that train beside the adapters.
        stored: store keys of weights that a checkpoint has in 4 bits: they stay so wherever the graph allows.
        kept: store keys of weights that stay dense because a 4-bit checkpoint has them dense.
        slots: how many adapters the rows of a batch choose among; 0: all rows have the same.
    """

    lora: LoraConfig
    quantization: Quantization = field(default_factory=Quantization)
    compute_dtype: torch.dtype = torch.float32
    output_heads: frozenset[str] = frozenset()
    input_embeddings: frozenset[str] = frozenset()
    also_quantize: frozenset[str] = frozenset()
    training: bool = True
    adapter: bool = True
    return_logits: bool = True
    disabled: frozenset[str] = frozenset()
    decided: Mapping[str, Any] | None = None
    trained: frozenset[str] = frozenset()
    stored: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    slots: int = 0

    def rank(self, site: str) -> int:
        pattern = self.lora.rank_pattern or {}
        return int(pattern.get(get_pattern_key(pattern.keys(), site), self.lora.r))

    def scaling(self, site: str) -> float:
        """``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rank-stabilized LoRA (arXiv:2312.03732)."""
        pattern = self.lora.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(pattern.keys(), site), self.lora.lora_alpha)
        r = self.rank(site)
        return float(alpha / math.sqrt(r) if self.lora.use_rslora else alpha / r)

    def with_(self, **changes: Any) -> Config:
        return replace(self, **changes)


def default_lora() -> LoraConfig:
    return LoraConfig(r=DEFAULT_RANK, lora_alpha=DEFAULT_RANK, target_modules="all-linear")
