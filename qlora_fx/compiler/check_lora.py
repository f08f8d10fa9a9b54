"""Which ``peft.LoraConfig`` can be honoured. Every field is, or is refused by name; nothing is ignored."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import MISSING, fields

from peft import LoraConfig

from ..config import DEFAULT_RANK, default_lora
from ..errors import ConfigError
from ..passes.thaw import is_saved

BIASES = ("none", "lora_only", "all")
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
        "bias",
        "modules_to_save",
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
    if lora.bias not in BIASES:
        raise ConfigError(
            f"LoraConfig.bias={lora.bias!r}; accepted: {', '.join(map(repr, BIASES))}"
        )
    for name, rank in {"r": lora.r, **(lora.rank_pattern or {})}.items():
        if not isinstance(rank, int) or rank < 1:
            where = "LoraConfig.r" if name == "r" else f"LoraConfig.rank_pattern[{name!r}]"
            raise ConfigError(f"{where}={rank!r}; accepted: an integer of at least 1")
    if not 0.0 <= lora.lora_dropout < 1.0:
        raise ConfigError(f"LoraConfig.lora_dropout={lora.lora_dropout!r}; accepted: 0 <= p < 1")
    return lora


NEW_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Heads that PEFT trains as a whole, by ``task_type`` (``PeftModelForSequenceClassification`` and its like in PEFT 0.21)."""


def with_new_head(lora: LoraConfig, parameters: Iterable[str]) -> LoraConfig:
    """``lora`` with the task's new head among its ``modules_to_save``, as PEFT does: an adapter cannot train a head
    that holds random numbers.

    Args:
        parameters: names of the model's parameters.
    """
    task = getattr(lora.task_type, "value", lora.task_type)
    saved = list(lora.modules_to_save or ())
    keys = list(parameters)
    found = [
        name
        for name in NEW_HEADS.get(task or "", ())
        if name not in saved and any(is_saved(key, (name,)) for key in keys)
    ]
    if not found:
        return lora
    changed = copy.deepcopy(lora)
    changed.modules_to_save = saved + found
    return changed
