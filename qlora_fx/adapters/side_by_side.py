"""A further adapter over a base: the same weights, with ranks, scalings and targets of its own."""

from __future__ import annotations

from dataclasses import replace

from peft import LoraConfig

from ..compiler.check_lora import check_lora
from ..config import Config
from ..errors import ConfigError
from ..passes.graph.site import Site
from ..passes.select import ranked
from ..passes.selection.targets import check_targets, is_targeted
from ..weights.base import Base


def with_adapter(base: Base, lora: LoraConfig) -> Base:
    """The base with the sites that ``lora`` adapts; its store has no tensors for them yet.

    Args:
        base: with the adapter that was there first: others adapt what it adapts, or less.

    Raises:
        ConfigError: ``lora`` names what the first adapter leaves out or nothing, has a rank that is too large, trains tensors
            of its own (``bias``, other ``modules_to_save``), or adapts other parameters of experts than the first.
    """
    lora = check_lora(lora)
    first = base.config.lora
    for name in ("bias", "modules_to_save"):
        mine, theirs = getattr(lora, name) or None, getattr(first, name) or None
        if mine != theirs:
            raise ConfigError(
                f"{name}={mine!r} beside an adapter with {name}={theirs!r}; accepted: the same"
            )
    config = base.config.with_(lora=lora)
    verdicts = {
        name: site_for(v, config) if isinstance(v, Site) else v for name, v in base.verdicts.items()
    }
    check_targets(config, list(verdicts.values()), {})
    made = replace(base, config=config, verdicts=verdicts)
    if parameters(made) != parameters(base):
        raise ConfigError(
            f"it adapts the parameters {parameters(made)}, the first adapter {parameters(base)}; accepted: the same, for "
            "PEFT's names of one depend on the others"
        )
    return made


def site_for(site: Site, config: Config) -> Site:
    """A site of the first adapter as ``config`` adapts it.

    Raises:
        ConfigError: the first adapter leaves it out, or its rank is too large.
    """
    wanted = is_targeted(config.lora, site.name, site.weight)
    if wanted is None:  # "all-linear"
        wanted = site.adapt and site.weight not in config.output_heads
    if wanted and site.adapt:
        return ranked(site, config)
    if wanted and site.kind != "embedding":
        raise ConfigError(
            f"it targets {site.name}, which the first adapter leaves out ({site.reason}); accepted: what that adapts, or less"
        )
    return without(site) if site.adapt else site


def without(site: Site) -> Site:
    reason = "not adapted: not in target_modules"
    return replace(site, adapt=False, reason=f"{site.reason}; {reason}" if site.reason else reason)


def parameters(base: Base) -> list[str]:
    """Weights that are adapted as parameters of their modules."""
    return sorted(s.weight for s in base.sites.values() if s.adapt and s.kind == "parameter")


def shape_of(base: Base) -> tuple[tuple[str, int, float, float], ...]:
    """What of an adapter is in captured graphs: adapters of one shape share them."""
    return tuple(
        (name, site.r, site.scaling, site.dropout)
        for name, site in base.sites.items()
        if site.adapt
    )
