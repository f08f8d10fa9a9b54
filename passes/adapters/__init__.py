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
    "adapter_of",
    "variant",
]

ADAPTERS: dict[str, Adapter] = {"lora": Lora()}
"""By ``variant``; qlora_fx/adapters has the same keys."""
ROLES = frozenset(role for adapter in ADAPTERS.values() for role in adapter.roles)


def variant(lora: LoraConfig) -> str:
    """Which of ``ADAPTERS`` a config asks for; compiler/request.py refuses configs that ask for another."""
    return "lora"


def adapter_of(lora: LoraConfig) -> Adapter:
    return ADAPTERS[variant(lora)]
