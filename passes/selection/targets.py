"""PEFT's rules for what a ``LoraConfig`` targets, and what to say where they name what cannot be adapted."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Collection, Mapping

from peft import LoraConfig

from ...config import Config
from ...errors import ConfigError
from ...transformers_internals import ExcludedModule, check_target_module_exists
from ..graph.site import Site, Skipped, Verdict


def targeted_parameter(lora: LoraConfig, key: str) -> bool:
    return any(names_parameter(target, key) for target in lora.target_parameters or ())


def is_targeted(lora: LoraConfig, name: str, key: str) -> bool | None:
    """Whether PEFT's rules name the site with this weight; None where they say "all-linear"."""
    if targeted_parameter(lora, key):
        return True
    if lora.target_modules in (None, "all-linear"):
        return False if lora.exclude_modules and is_excluded(lora, name) else None
    return bool(lora.target_modules and check_target_module_exists(lora, name))


def is_excluded(lora: LoraConfig, name: str) -> bool:
    return isinstance(check_target_module_exists(lora, name), ExcludedModule)


def check_targets(config: Config, found: list[Verdict], holders: Mapping[str, str]) -> None:
    """Refuse a LoRA config that adapts nothing; say which entries match nothing, or what cannot be adapted."""
    names = [v.name for v in found]
    sites = [v for v in found if isinstance(v, Site)]
    adapted = [s for s in sites if s.adapt]
    targets = config.lora.target_modules
    for target in sorted(config.lora.target_parameters or ()):
        if not any(names_parameter(target, s.weight) for s in adapted):
            why = [f"{v.name} ({v.reason})" for v in found if names_parameter(target, v.weight)]
            keys = sorted({".".join(v.weight.rsplit(".", 2)[-2:]) for v in found})
            raise ConfigError(
                f"target_parameters entry {target!r} matches no parameter that can be adapted"
                + (f": {', '.join(why[:3])}" if why else "")
                + f". Parameters of linears: {', '.join(keys[:12])}"
            )
    entries = () if isinstance(targets, str) or targets is None else sorted(targets)
    doubts = [doubt for t in entries if (doubt := check_target(t, found, holders))]
    if not adapted:
        large = [s for s in sites if "not adapted: r=" in s.reason]
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


def names_parameter(target: str, key: str) -> bool:
    """PEFT's rule for one entry of ``target_parameters``: the parameter's name or the end of it."""
    return key == target or key.endswith(f".{target}")


def check_target(target: str, found: list[Verdict], holders: Mapping[str, str]) -> str:
    """What to say about one entry of ``target_modules``; empty if all it names is adapted.

    Raises:
        ConfigError: if all it names are operations that cannot be adapted.
    """

    def named(name: str) -> bool:
        return name == target or name.endswith(f".{target}")

    hit = [v for v in found if named(v.name)]
    cannot = {v.name: v.reason for v in hit if isinstance(v, Skipped)}
    cannot |= {n: "an embedding" for n, kind in holders.items() if kind == "embedding" and named(n)}
    if cannot and all(v.name in cannot for v in hit):
        name, reason = next(iter(cannot.items()))
        more = f" and {len(cannot) - 1} more" if len(cannot) > 1 else ""
        raise ConfigError(
            f"target_modules entry {target!r} names {name}{more}, which cannot be adapted: {reason}. "
            "Accepted: linears, convolutions of width 1, and expert weights; qlora_fx.explain lists them"
        )
    if cannot:
        names = ", ".join(f"{n} ({r})" for n, r in cannot.items())
        return f"target_modules entry {target!r} also names what cannot be adapted: {names}"
    if not hit:
        hints = near([target], [v.name for v in found])
        return f"target_modules entry {target!r} matches no linear of this model.{hints}"
    return ""


def near(targets: str | Collection[str] | None, names: list[str]) -> str:
    """A hint with the names closest to what was asked for."""
    leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
    entries = [targets] if isinstance(targets, str) else sorted(targets or [])
    ends = [target.rsplit(".", 1)[-1] for target in entries]
    close = {name for end in ends for name in difflib.get_close_matches(end, leaves, 3, 0.4)}
    hint = f" Near names: {', '.join(sorted(close))}." if close else ""
    return f"{hint} Linears of this model: {', '.join(leaves)}; or 'all-linear'"
