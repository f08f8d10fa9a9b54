"""Kinds of adapters, as nodes; their values are qlora_fx/adapters'.

adapter  what every kind can do
lora     LoRA
"""

from __future__ import annotations

from peft import LoraConfig

from .adapter import ADAPTER_DTYPE, Adapter, AdapterTensor, Product
from .lora import Lora

__all__ = [
    "ADAPTERS",
    "ADAPTER_DTYPE",
    "ROLES",
    "Adapter",
    "AdapterTensor",
    "Product",
    "adapter_kind",
    "adapter_of",
]

ADAPTERS: dict[str, Adapter] = {"lora": Lora()}
"""By ``adapter_kind``; qlora_fx/adapters has the same keys."""
ROLES = frozenset(role for adapter in ADAPTERS.values() for role in adapter.roles)


def adapter_kind(lora: LoraConfig) -> str:
    """Which of ``ADAPTERS`` a config asks for; compiler/check_lora.py refuses configs that ask for another."""
    return "lora"


def adapter_of(lora: LoraConfig) -> Adapter:
    return ADAPTERS[adapter_kind(lora)]
