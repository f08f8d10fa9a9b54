"""Adapters in PEFT's terms: which config to save, how values are taken over."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig

from .errors import AdapterError
from .passes.nodes import Site


def apply_adapter(current: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
    """Copy ``state`` into ``current``, all of it or nothing.

    Raises:
        AdapterError: listing missing, unknown and misshapen keys.
    """
    missing = sorted(current.keys() - state.keys())
    unknown = sorted(state.keys() - current.keys())
    if missing or unknown:
        lines = [f"missing: {some(missing)}"] if missing else []
        if unknown:
            near = difflib.get_close_matches(unknown[0], list(current), 1)
            hint = f" (near: {near[0]})" if near else ""
            lines.append(f"not in this model: {some(unknown)}{hint}")
        raise AdapterError("adapter does not fit this model; " + "; ".join(lines))
    for key, tensor in current.items():
        if state[key].shape != tensor.shape:
            raise AdapterError(
                f"{key} has shape {list(state[key].shape)}; this model's is {list(tensor.shape)}"
            )
        if not torch.isfinite(state[key]).all():
            raise AdapterError(f"{key} holds NaN or infinity")
    with torch.no_grad():
        for key, tensor in current.items():
            tensor.copy_(state[key])


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def saved_config(lora: LoraConfig, sites: Mapping[str, Site], config: Any) -> dict[str, Any]:
    """``adapter_config.json``: the user's config with its targets resolved to names that PEFT finds."""
    saved = copy.deepcopy(lora)
    saved.inference_mode = True
    saved.base_model_name_or_path = (
        saved.base_model_name_or_path or getattr(config, "_name_or_path", None) or None
    )
    if saved.target_modules in (None, "all-linear"):
        saved.target_modules = target_names(sites)
        saved.exclude_modules = None
    plain: dict[str, Any] = saved.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}


def target_names(sites: Mapping[str, Site]) -> list[str]:
    """The shortest list for PEFT that names exactly the adapted sites: leaf names, or full names."""
    adapted = {s.name for s in sites.values() if s.adapt}
    others = {s.name for s in sites.values() if not s.adapt}
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    if any(o.rsplit(".", 1)[-1] in leaves for o in others):
        return sorted(adapted)
    return sorted(leaves)
