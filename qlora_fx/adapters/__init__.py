"""Adapters' values, and adapters as PEFT has them. Their nodes are passes/adapters'.

values       what every kind of adapter can do with its values
lora         LoRA's
initialize   new adapters
trained      dense tensors that train beside them
peft_format  PEFT's names and config, and values that are taken over
"""

from __future__ import annotations

from peft import LoraConfig

from ..passes.adapters import adapter_kind
from .lora import LoraValues
from .values import AdapterValues

__all__ = ["VALUES", "AdapterValues", "values_of"]

VALUES: dict[str, AdapterValues] = {"lora": LoraValues()}
"""By ``passes.adapters.adapter_kind``."""


def values_of(lora: LoraConfig) -> AdapterValues:
    return VALUES[adapter_kind(lora)]
