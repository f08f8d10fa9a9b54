"""Adapters in PEFT's terms: which config to save, how values are taken over."""

from __future__ import annotations

import copy
import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig

from ..compiler.check_lora import check_lora
from ..config import Config
from ..errors import AdapterError, ConfigError
from ..passes.adapters import Adapter
from ..passes.graph.site import Site
from ..transformers_internals import fused_expert_names
from ..weights.base import Base
from .trained import trained_names


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


def peft_names(
    adapter: Adapter,
    sites: Mapping[str, Site],
    parameters: Iterable[str],
    trained: Mapping[str, str],
) -> dict[str, str]:
    """PEFT's path of each adapter tensor and of each tensor that trains beside them, by store key.

    A module's adapter lies at the module's path. A parameter's adapter (``target_parameters``) wraps the
    module that holds the parameter; of several on one module the first wraps it and the next wraps that, so
    that the inner ones and all that lies below the module have ``base_layer`` in their path
    (``peft.tuners.tuners_utils.BaseTuner._inject_parameters``).

    Args:
        adapter: which tensors a site has.
        sites: the model's sites.
        parameters: parameter names in the order in which the model holds them.
        trained: as ``weights.Base`` has it.
    """
    place = {name: i for i, name in enumerate(parameters)}
    wrapped: dict[str, list[str]] = {}
    for site in sites.values():
        if site.adapt and site.kind == "parameter":
            wrapped.setdefault(site.weight.rpartition(".")[0], []).append(site.weight)
    for keys in wrapped.values():
        keys.sort(key=lambda key: place.get(key, len(place)))

    def path(module: str) -> str:
        parts = module.split(".")
        out: list[str] = []
        for i, part in enumerate(parts):
            above = ".".join(parts[:i])
            out += ["base_layer"] * len(wrapped.get(above, ())) + [part]
        return ".".join(out)

    names: dict[str, str] = {}
    for site in sites.values():
        if not site.adapt:
            continue
        for role, tensor in adapter.tensors(site).items():
            if site.kind == "parameter":
                owner = site.weight.rpartition(".")[0]
                inner = len(wrapped[owner]) - 1 - wrapped[owner].index(site.weight)
                names[tensor.key] = ".".join([path(owner), *["base_layer"] * inner, role, "weight"])
            else:
                names[tensor.key] = path(tensor.key)
    return names | trained_names(trained, sites, path)


def saved_config(base: Base) -> dict[str, Any]:
    """``adapter_config.json``: the user's config with its targets resolved to names that PEFT finds in the model."""
    sites, model = base.sites, base.skeleton.model
    config: Any = model.config
    modules = [path for path, _ in model.named_modules(remove_duplicate=False)]
    saved = copy.deepcopy(base.config.lora)
    saved.inference_mode = True
    saved.base_model_name_or_path = (
        saved.base_model_name_or_path or getattr(config, "name_or_path", None) or None
    )
    adapted = [s for s in sites.values() if s.adapt]
    # Note [Targets that PEFT renames]
    claimed = fused_expert_names(getattr(config, "model_type", None))
    by_parameter = {s.weight for s in adapted if s.kind == "parameter"}
    by_parameter |= {
        s.weight for s in adapted if s.kind == "linear" and s.name.rpartition(".")[2] in claimed
    }
    if saved.target_modules in (None, "all-linear") or by_parameter:
        saved.target_modules = target_names(sites, modules, by_parameter)
        saved.exclude_modules = None
    if by_parameter:
        weights = {verdict.weight for verdict in base.verdicts.values() if verdict.weight}
        saved.target_parameters = parameter_names(weights, by_parameter)
        if saved.lora_dropout:
            saved.lora_dropout = 0.0
            warnings.warn(
                "adapter_config.json says lora_dropout=0: PEFT refuses dropout on target_parameters "
                f"({min(by_parameter)} and others). It plays no part when the adapter is used",
                stacklevel=3,
            )
    own = [s.name for s in adapted if s.kind == "own"]
    if own:
        warnings.warn(
            f"PEFT has no adapter for {some(own)}: the saved folder loads here, but PEFT will not find "
            "these tensors' places",
            stacklevel=3,
        )
    unheard = [s.name for s in adapted if not s.module_runs]
    if unheard:
        warnings.warn(
            f"in PEFT the adapters of {some(unheard)} have no effect: another module reads their weights. The saved "
            "folder loads here as it was trained",
            stacklevel=3,
        )
    plain: dict[str, Any] = saved.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}


# Note [Targets that PEFT renames]
# For models whose experts transformers 5 fused, PEFT takes target_modules with the leaf names of the old experts
# (gate_proj, up_proj, down_proj, w1, w2, w3, gate) to mean the fused parameters, and doubles the rank of the fused
# gate_up_proj, also where the names are those of shared experts or of layers without experts, which it then leaves
# out. Named as target_parameters (shared_experts.gate_proj.weight) the same modules are adapted as they are: the
# tensors, their names and their shapes are those of the module's own adapter.


def target_names(
    sites: Mapping[str, Site], modules: Collection[str], by_parameter: Collection[str] = ()
) -> list[str]:
    """The shortest list for PEFT that names exactly the adapted modules: leaf names, or full names.

    Args:
        modules: all paths of the model: a leaf may also name a module that is no linear, or that nothing runs.
        by_parameter: weights that ``target_parameters`` names.
    """
    adapted = {
        s.name
        for s in sites.values()
        if s.kind in ("linear", "conv") and s.adapt and s.weight not in by_parameter
    }
    leaves = {name.rsplit(".", 1)[-1] for name in adapted}
    if any(path.rsplit(".", 1)[-1] in leaves for path in modules if path not in adapted):
        return sorted(adapted)
    return sorted(leaves)


def parameter_names(weights: Collection[str], adapted: Collection[str]) -> list[str]:
    """The same for ``target_parameters``: what follows the layer's number, or full names.

    Args:
        weights: of all linears.
    """
    others = set(weights).difference(adapted)
    ends = {re.split(r"\.\d+\.", key)[-1] for key in adapted}
    if any(other.endswith(f".{end}") for other in others for end in ends):
        return sorted(adapted)
    return sorted(ends)


def check_saved(config: dict[str, Any], sites: Mapping[str, Site], folder: str) -> None:
    """Raise if a saved adapter's ranks and scalings are not those of the model's sites.

    Raises:
        AdapterError: naming the first site that differs.
    """
    try:
        theirs = check_lora(LoraConfig.from_peft_type(**config))
    except (ConfigError, TypeError, ValueError) as error:
        raise AdapterError(f"{folder}: {error}") from error
    difference = first_difference(theirs, sites)
    if difference:
        raise AdapterError(
            f"{folder}: {difference}. Transform the model with lora=peft.LoraConfig.from_pretrained({folder!r}) to "
            "take them over"
        )


def first_difference(lora: LoraConfig, sites: Mapping[str, Site]) -> str:
    """Which adapted site would have another rank or scaling by ``lora``, and which; empty if none would."""
    theirs = Config(lora=lora)
    for site in sites.values():
        new = (theirs.rank(site.name), theirs.scaling(site.name))
        if site.adapt and new != (site.r, site.scaling):
            return (
                f"{site.name} has rank {new[0]} and scaling {new[1]:g} there, rank {site.r} and scaling "
                f"{site.scaling:g} here"
            )
    return ""
