"""PEFT's rules for what a ``LoraConfig`` targets, and what to say where they name what cannot be adapted."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ...transformers_internals import check_target_module_exists
from ..graph.site import Site


def targeted_parameter(lora: Any, key: str) -> bool:
    """PEFT's rule for ``target_parameters``: the parameter's name or the end of it."""
    return any(key == t or key.endswith(f".{t}") for t in lora.target_parameters or ())


def is_excluded(lora: Any, name: str) -> bool:
    return type(check_target_module_exists(lora, name)).__name__ == "_ExcludedModule"


def check_targets(config: Any, found: list[Site], holders: Mapping[str, str]) -> None:
    """Refuse a LoRA config that adapts nothing; say which entries match nothing, or what cannot be adapted."""
    names = [s.name for s in found]
    targets = config.lora.target_modules
    for target in sorted(config.lora.target_parameters or ()):
        if not any(s.weight == target or s.weight.endswith(f".{target}") for s in found if s.adapt):
            why = [f"{s.name} ({s.reason})" for s in found if names_parameter(s, target)]
            keys = sorted({".".join(s.weight.rsplit(".", 2)[-2:]) for s in found})
            raise ConfigError(
                f"target_parameters entry {target!r} matches no parameter that can be adapted"
                + (f": {', '.join(why[:3])}" if why else "")
                + f". Parameters of linears: {', '.join(keys[:12])}"
            )
    entries = () if isinstance(targets, str) or targets is None else sorted(targets)
    doubts = [doubt for t in entries if (doubt := check_target(t, found, holders))]
    if not any(s.adapt for s in found):
        large = [s for s in found if "not adapted: r=" in s.reason]
        if large:
            raise ConfigError(
                f"LoraConfig.r={config.lora.r} is larger than the smaller dimension of every linear of this "
                f"model, for example {large[0].name} {list(large[0].shape)}"
            )
        raise ConfigError(
            f"target_modules={targets!r} with exclude_modules={config.lora.exclude_modules!r}, "
            f"layers_to_transform={config.lora.layers_to_transform!r} matches no linear of this model."
            f"{near(targets, names)}"
        )
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=3)


def names_parameter(site: Site, target: str) -> bool:
    return site.weight == target or site.weight.endswith(f".{target}")


def check_target(target: str, found: list[Site], holders: Mapping[str, str]) -> str:
    """What to say about one entry of ``target_modules``; empty if all it names is adapted.

    Raises:
        ConfigError: if all it names are operations that cannot be adapted.
    """

    def named(name: str) -> bool:
        return name == target or name.endswith(f".{target}")

    hit = [s for s in found if named(s.name)]
    cannot = {s.name: s.reason for s in hit if not s.layout}
    cannot |= {n: "an embedding" for n, kind in holders.items() if kind == "embedding" and named(n)}
    if cannot and all(s.name in cannot for s in hit):
        name, reason = next(iter(cannot.items()))
        more = f" and {len(cannot) - 1} more" if len(cannot) > 1 else ""
        raise ConfigError(
            f"target_modules entry {target!r} names {name}{more}, which cannot be adapted: {reason}. "
            "Accepted: linears, convolutions of width 1, and expert weights; qlora_fx.explain lists them"
        )
    if cannot:
        listed = ", ".join(f"{n} ({r})" for n, r in cannot.items())
        return f"target_modules entry {target!r} also names what cannot be adapted: {listed}"
    if not hit:
        hints = near([target], [s.name for s in found])
        return f"target_modules entry {target!r} matches no linear of this model.{hints}"
    return ""


def near(targets: Any, names: list[str]) -> str:
    """A hint with the names closest to what was asked for."""
    leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
    asked = [targets] if isinstance(targets, str) else sorted(targets or [])
    close = {
        c for a in asked for c in difflib.get_close_matches(a.rsplit(".", 1)[-1], leaves, 3, 0.4)
    }
    hint = f" Near names: {', '.join(sorted(close))}." if close else ""
    return f"{hint} Linears of this model: {', '.join(leaves)}; or 'all-linear'"
