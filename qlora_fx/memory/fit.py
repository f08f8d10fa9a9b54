"""``plan(fit=)``: the settings nearest to those asked for that fit, cheapest loss of speed first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from peft import LoraConfig

from ..errors import ConfigError
from .estimate import Draft
from .report import Plan

SHORTEST, LOWEST = 128, 8
"""Tokens and rank below which nobody would call it the same training."""


def search(
    draft: Draft, asked: dict[str, Any], limit: int, redraft: Callable[[LoraConfig], Draft]
) -> Plan:
    """The first of these that fits: as asked; less kept for backward; 8-bit optimizer state; a smaller batch; a lower
    rank; shorter rows. Each includes those before it; less is kept only as far as it has to be.

    Args:
        draft: the traced model.
        asked: arguments of ``Draft.plan``.
        limit: bytes.
        redraft: traces the model with another ``LoraConfig``.

    Raises:
        ConfigError: nothing fits, with the least that is possible.
    """
    least: Plan | None = None
    for candidate, settings, changed in candidates(draft, asked, redraft):
        whole = candidate.plan(**settings)
        if whole.peak <= limit:
            return replace(whole, limit=limit, changed=changed)
        smallest = candidate.plan(**{**settings, "memory_budget": 0.0})
        if smallest.peak <= limit:
            found = keep_most(candidate, settings, limit, smallest)
            budget = found.settings["memory_budget"]
            note = f"memory_budget={budget}: {found.recomputation:.0%} of products computed again"
            return replace(found, limit=limit, changed=[*changed, note])
        least = smallest
    assert least is not None
    raise ConfigError(
        f"{least.model} does not fit {limit / 1e9:g} GB: with {least.settings} it takes {least.peak / 1e9:.2f} GB, of which "
        f"{least.footprint.total / 1e9:.2f} GB are the model and its adapter. Accepted: more memory, or a smaller model"
    )


def candidates(
    draft: Draft, asked: dict[str, Any], redraft: Callable[[LoraConfig], Draft]
) -> Iterator[tuple[Draft, dict[str, Any], list[str]]]:
    settings = dict(asked)
    changed: list[str] = []
    yield draft, settings, changed
    if not settings["optimizer"].endswith("8bit"):
        settings = {**settings, "optimizer": smaller_state(settings["optimizer"])}
        changed = [*changed, f"optimizer={settings['optimizer']!r}"]
        yield draft, settings, changed
    while settings["batch_size"] > 1:
        settings = {**settings, "batch_size": settings["batch_size"] // 2}
        changed = [
            *(c for c in changed if "batch" not in c),
            f"batch_size={settings['batch_size']}",
        ]
        yield draft, settings, changed
    lora = draft.prepared.base.config.lora
    while lora.r > LOWEST:
        lora = lower_rank(lora)
        draft = redraft(lora)
        note = f"LoraConfig(r={lora.r}, lora_alpha={lora.lora_alpha:g}), the same scaling"
        changed = [*(c for c in changed if "LoraConfig" not in c), note]
        yield draft, settings, changed
    while settings["sequence_length"] > SHORTEST:
        shorter = max(SHORTEST, settings["sequence_length"] // 2)
        settings = {**settings, "sequence_length": shorter}
        changed = [*(c for c in changed if "sequence" not in c), f"sequence_length={shorter}"]
        yield draft, settings, changed


def lower_rank(lora: LoraConfig) -> LoraConfig:
    """The config with about half of every rank, none below ``LOWEST``, and the scaling that it had."""
    lower = copy.deepcopy(lora)
    lower.r = max(LOWEST, lora.r // 2)
    ratio = lower.r / lora.r
    lower.lora_alpha = lora.lora_alpha * (math.sqrt(ratio) if lora.use_rslora else ratio)
    for name, rank in (lora.rank_pattern or {}).items():
        lower.rank_pattern[name] = max(min(rank, LOWEST), int(rank * ratio))
    return lower


def smaller_state(optimizer: str) -> str:
    return optimizer.removesuffix("32bit") + "8bit"


def keep_most(draft: Draft, settings: dict[str, Any], limit: int, smallest: Plan) -> Plan:
    """The largest memory budget whose peak fits, to 1 % of what keeping everything takes."""
    low, found = 0, smallest
    high = (
        100
        if not isinstance(settings["memory_budget"], float)
        else int(100 * settings["memory_budget"])
    )
    while high - low > 1:
        middle = (low + high) // 2
        plan = draft.plan(**{**settings, "memory_budget": middle / 100})
        if plan.peak <= limit:
            low, found = middle, plan
        else:
            high = middle
    return found
