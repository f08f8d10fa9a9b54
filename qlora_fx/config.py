"""What the user asked for, checked: ``peft.LoraConfig`` and ``transformers.BitsAndBytesConfig`` to ``Config``.

Every field of the two is honoured or refused by name; nothing is ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from transformers import BitsAndBytesConfig

from .errors import ConfigError

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STORAGE_DTYPES = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32)
ROLES = ("head", "embeddings", "routers")
"""What stays dense unless ``also_quantize`` names it."""
DEFAULT_RANK = 16
"""Rank used when no ``LoraConfig`` is given; ``lora_alpha`` is then the same, a scaling of 1."""

HONOURED = frozenset(
    [
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
    ]
)
# Bookkeeping of PEFT's that changes nothing in the adapter; kept when the adapter is saved.
CARRIED = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "fan_in_fan_out",
        "runtime_config",
        "qalora_group_size",
    ]
)


@dataclass(frozen=True)
class Quantization:
    """How base weights are stored.

    Attributes:
        quant_type: ``nf4`` or ``fp4``.
        blocksize: weights per absmax, one of ``BLOCKSIZES``.
        double_quant: whether the absmax are themselves quantized to 8 bits, in blocks of 256.
        storage_dtype: dtype in which the packed bytes are held (``bnb_4bit_quant_storage``).
        skip: module names that stay dense (``llm_int8_skip_modules``).
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    storage_dtype: torch.dtype = torch.uint8
    skip: tuple[str, ...] = ()


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
        decided: for captures after the first, the verdicts of the first, by site name: storage and adapters
            exist and are not decided again.
        stored: store keys of weights that a checkpoint has in 4 bits: they stay so wherever the graph allows.
        kept: store keys of weights that stay dense because a 4-bit checkpoint has them dense.
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
    stored: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()

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


def check_lora(lora: LoraConfig | None) -> LoraConfig:
    """The user's ``LoraConfig`` if every field of it can be honoured.

    Raises:
        ConfigError: naming the field, its value, and what is accepted.
    """
    if lora is None:
        return default_lora()
    if not isinstance(lora, LoraConfig):
        raise ConfigError(
            f"lora={lora!r} is a {type(lora).__name__}; accepted: a peft.LoraConfig, or None for "
            f'LoraConfig(r={DEFAULT_RANK}, lora_alpha={DEFAULT_RANK}, target_modules="all-linear")'
        )
    for f in fields(lora):
        if f.name in HONOURED | CARRIED:
            continue
        value = getattr(lora, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if value != default and value not in (None, False) and value != {}:
            raise ConfigError(
                f"LoraConfig.{f.name}={value!r} is not supported; accepted: {default!r} (its default). "
                f"Supported fields: {', '.join(sorted(HONOURED))}"
            )
    if lora.init_lora_weights not in (True, False, "gaussian"):
        raise ConfigError(
            f"LoraConfig.init_lora_weights={lora.init_lora_weights!r} is not supported; "
            "accepted: True, False, 'gaussian'"
        )
    for name, rank in {"r": lora.r, **(lora.rank_pattern or {})}.items():
        if not isinstance(rank, int) or rank < 1:
            where = "LoraConfig.r" if name == "r" else f"LoraConfig.rank_pattern[{name!r}]"
            raise ConfigError(f"{where}={rank!r}; accepted: an integer of at least 1")
    if not 0.0 <= lora.lora_dropout < 1.0:
        raise ConfigError(f"LoraConfig.lora_dropout={lora.lora_dropout!r}; accepted: 0 <= p < 1")
    return lora


def check_quantization(
    quantization: BitsAndBytesConfig | None, blocksize: int
) -> tuple[Quantization, torch.dtype | None]:
    """Storage settings, and the compute dtype the config asks for (None where there is no config).

    Raises:
        ConfigError: naming the field, its value, and what is accepted.
    """
    if blocksize not in BLOCKSIZES:
        raise ConfigError(f"blocksize={blocksize!r}; accepted: {', '.join(map(str, BLOCKSIZES))}")
    if quantization is None:
        return Quantization(blocksize=blocksize), None
    if not isinstance(quantization, BitsAndBytesConfig):
        raise ConfigError(
            f"quantization={quantization!r} is a {type(quantization).__name__}; accepted: a "
            "transformers.BitsAndBytesConfig(load_in_4bit=True, ...), or None for NF4 with double quantization"
        )
    q = quantization
    if q.load_in_8bit or not q.load_in_4bit:
        raise ConfigError(
            f"BitsAndBytesConfig.load_in_4bit={q.load_in_4bit}, load_in_8bit={q.load_in_8bit}; "
            "accepted: load_in_4bit=True"
        )
    plain = BitsAndBytesConfig()
    for name in (
        "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
    ):
        if getattr(q, name) != getattr(plain, name):
            raise ConfigError(
                f"BitsAndBytesConfig.{name}={getattr(q, name)!r} has no meaning in 4 bits; "
                f"accepted: {getattr(plain, name)!r} (its default)"
            )
    if q.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise ConfigError(
            f"BitsAndBytesConfig.bnb_4bit_quant_type={q.bnb_4bit_quant_type!r}; accepted: 'nf4', 'fp4'"
        )
    if q.bnb_4bit_quant_storage not in STORAGE_DTYPES:
        raise ConfigError(
            f"BitsAndBytesConfig.bnb_4bit_quant_storage={q.bnb_4bit_quant_storage}; accepted: "
            + ", ".join(map(str, STORAGE_DTYPES))
        )
    checked = Quantization(
        quant_type=q.bnb_4bit_quant_type,
        blocksize=blocksize,
        double_quant=q.bnb_4bit_use_double_quant,
        storage_dtype=q.bnb_4bit_quant_storage,
        skip=tuple(q.llm_int8_skip_modules or ()),
    )
    return checked, q.bnb_4bit_compute_dtype


def check_roles(roles: Any) -> frozenset[str]:
    """``also_quantize`` as a set.

    Raises:
        ConfigError: for a member that is not one of ``ROLES``.
    """
    given = [roles] if isinstance(roles, str) else list(roles)
    for role in given:
        if role not in ROLES:
            raise ConfigError(
                f"also_quantize has {role!r}; accepted: {', '.join(map(repr, ROLES))}"
            )
    return frozenset(given)


def check_disabled(names: Any, optional: Iterable[str]) -> frozenset[str]:
    """``disable`` as a set.

    Raises:
        ConfigError: for a member that is no optional stage.
    """
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in optional:
            raise ConfigError(f"disable has {name!r}; accepted: {', '.join(map(repr, optional))}")
    return frozenset(given)


def check_compute_dtype(dtype: Any) -> torch.dtype | None:
    """``"auto"`` gives None; a dtype or its name gives the dtype."""
    if dtype == "auto":
        return None
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype not in COMPUTE_DTYPES:
        names = ", ".join(str(d) for d in COMPUTE_DTYPES)
        raise ConfigError(f"compute_dtype={dtype!r}; accepted: 'auto', {names}")
    result: torch.dtype = dtype
    return result
