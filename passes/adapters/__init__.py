"""Kinds of adapters, as nodes; their values are qlora_fx/adapters'.

adapter    what every kind can do
lora       LoRA
lora_rows  LoRA of which each row of a batch chooses one
"""

from __future__ import annotations

from peft import LoraConfig

from .adapter import ADAPTER_DTYPE, Adapter, AdapterTensor, Product
from .lora import Lora
from .lora_rows import SLOT_OF_ROW, LoraOfRows

__all__ = [
    "ADAPTERS",
    "ADAPTER_DTYPE",
    "ROLES",
    "SLOT_OF_ROW",
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


def adapter_of(lora: LoraConfig, slots: int = 0) -> Adapter:
    """The kind that a config asks for; with ``slots``, as stacks of as many among which rows of a batch choose."""
    return LoraOfRows(slots) if slots else ADAPTERS[adapter_kind(lora)]
