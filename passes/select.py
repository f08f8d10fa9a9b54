"""select: give every linear its verdict. Later stages only look at the mark."""

from __future__ import annotations

import difflib
import warnings
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import ConfigError
from .nodes import Site, aten, parameter_behind, sites

PRODUCTS = frozenset(
    {
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten.matmul.default,
        aten.einsum.default,
        aten.bilinear.default,
        aten.mv.default,
        aten.addmv.default,
        aten._grouped_mm.default,
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.convolution.default,
    }
)
"""Operations that multiply by a weight but are not a canonical linear: reported, kept dense."""


def select(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Mark each product with a weight with ``meta["site"]``; computes nothing, adds no node.

    Before::

        %q_proj: f32[B, S, 8] = aten.linear(%x, %q_proj_weight)

    After::

        %q_proj: f32[B, S, 8] = aten.linear(%x, %q_proj_weight)  # site q_proj: quantize, adapt r=16

    Raises:
        ConfigError: if a LoRA target matches nothing, or a rank is larger than a weight's dimension.
    """
    verdicts: dict[fx.Node, Site] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or "site" in node.meta:
            continue
        if node.target is aten.linear.default:
            verdicts[node] = judge_linear(node, config)
        elif is_unrecognised_product(node):
            verdicts[node] = judge_unrecognised(node)
    if config.decided is None:
        check_targets(config, [n.meta["site"] for n in sites(gm.graph)] + [*verdicts.values()])
    for node, site in verdicts.items():
        node.meta["site"] = site
        if site.reason.startswith("unrecognised"):
            warnings.warn(f"{site.name}: {site.reason}; it stays dense and unadapted", stacklevel=2)
    return PassResult(gm, bool(verdicts))


def judge_linear(node: fx.Node, config: Any) -> Site:
    weight = parameter_behind(node.args[1])
    op = node.meta.get("op", "linear")
    out_features, in_features = node.args[1].meta["val"].shape  # type: ignore[union-attr]
    if weight is None or isinstance(out_features, torch.SymInt):
        name = node.meta.get("module") or node.name
        return Site(name, "", op, 0, 0, reason="the weight is computed, not a parameter")
    key = weight.meta["stored"]
    name = site_name(node, key)
    transposed = node.args[1] is not weight
    site = Site(name, key, op, int(out_features), int(in_features), transposed)
    if transposed and not is_plain_transpose(node.args[1], weight):
        return replace(site, reason="the weight is reshaped before it is used")

    if config.decided is not None:
        if name in config.decided:
            decided: Site = config.decided[name]
            return replace(decided, op=op)
        return replace(site, reason="not in the graph that transform captured")
    dense = why_dense(key, name, weight, config)
    bare = why_bare(key, name, config)
    site = replace(
        site, quantize=not dense, adapt=not bare, reason="; ".join(filter(None, (dense, bare)))
    )
    if site.adapt:
        r = config.rank(name)
        if r > min(out_features, in_features):
            raise ConfigError(
                f"LoRA rank r={r} is larger than the smaller dimension of {name} "
                f"[{out_features}, {in_features}]; accepted: at most {min(out_features, in_features)}. "
                "Lower r, or give this module its own rank in rank_pattern"
            )
        site = replace(
            site, r=r, scaling=config.scaling(name), dropout=float(config.lora.lora_dropout)
        )
    return site


def site_name(node: fx.Node, key: str) -> str:
    """The module that is this linear, as PEFT names it; where there is none, the weight's own path.

    The two differ for a tied weight: the head of a model is ``lm_head`` though its weight is stored as
    ``model.embed_tokens.weight``.
    """
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if stack:
        path, cls = stack[-1]
        if str(cls).rstrip("'>").rsplit(".", 1)[-1] in ("Linear", "Conv1D"):
            return str(path)
    return key.removesuffix(".weight")


def why_dense(key: str, name: str, weight: fx.Node, config: Any) -> str:
    """Why this weight is not quantized; empty if it is."""
    if key in config.output_heads:
        return "output head stays dense"
    for skipped in config.quantization.skip:
        if name == skipped or name.endswith(f".{skipped}") or name.startswith(f"{skipped}."):
            return f"listed in llm_int8_skip_modules ({skipped})"
    val = weight.meta["val"]
    if val.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"a weight of {val.dtype} cannot be quantized to 4 bits"
    others = sorted({str(u.target) for u in weight.users if not reads_as_linear_weight(u, weight)})
    if others:
        return f"the weight is also read by {', '.join(others)}"
    return ""


def why_bare(key: str, name: str, config: Any) -> str:
    """Why this linear gets no LoRA branch; empty if it does."""
    targets = config.lora.target_modules
    if targets is None or targets == "all-linear":
        if key in config.output_heads:
            return "not adapted: 'all-linear' leaves the output head out"
        if config.lora.exclude_modules and is_excluded(config.lora, name):
            return "not adapted: in exclude_modules"
        return ""
    if check_target_module_exists(config.lora, name):
        return ""
    if config.lora.exclude_modules and is_excluded(config.lora, name):
        return "not adapted: in exclude_modules"
    return "not adapted: not in target_modules"


def is_excluded(lora: Any, name: str) -> bool:
    return type(check_target_module_exists(lora, name)).__name__ == "_ExcludedModule"


def reads_as_linear_weight(user: fx.Node, weight: fx.Node) -> bool:
    if user.target is aten.linear.default:
        return user.args[1] is weight and user.args[0] is not weight
    return user.target is aten.t.default and all(
        reads_as_linear_weight(u, user) for u in user.users
    )


def is_plain_transpose(node: Any, weight: fx.Node) -> bool:
    return node.target is aten.t.default and node.args[0] is weight


def is_unrecognised_product(node: fx.Node) -> bool:
    if node.target not in PRODUCTS:
        # Composite expert products of transformers are ops of their own: any op outside aten
        # that reads a weight of two or more dimensions is reported rather than passed over.
        namespace = getattr(node.target, "namespace", "aten")
        if namespace in ("aten", "bitsandbytes", "_operator", "qlora_fx", "prims"):
            return False
    return any(weight_like(p) for p in (parameter_behind(a) for a in node.all_input_nodes))


def weight_like(placeholder: fx.Node | None) -> bool:
    return placeholder is not None and placeholder.meta["val"].dim() >= 2


def judge_unrecognised(node: fx.Node) -> Site:
    weight = next(p for p in map(parameter_behind, node.all_input_nodes) if weight_like(p))
    assert weight is not None
    key = weight.meta["stored"]
    op = str(node.target).removeprefix("aten.").removesuffix(".default")
    reason = (
        "convolutions stay dense" if "conv" in op else f"unrecognised product with a weight ({op})"
    )
    return Site(key.removesuffix(".weight"), key, op, 0, 0, reason=reason)


def check_targets(config: Any, found: list[Site]) -> None:
    """Refuse a LoRA config that adapts nothing; warn about a list entry that matches nothing."""
    names = [s.name for s in found]
    targets = config.lora.target_modules
    if not any(s.adapt for s in found):
        raise ConfigError(
            f"target_modules={targets!r} with exclude_modules={config.lora.exclude_modules!r}, "
            f"layers_to_transform={config.lora.layers_to_transform!r} matches no linear of this model."
            f"{near(targets, names)}"
        )
    if not isinstance(targets, str) and targets is not None:
        for target in targets:
            if not any(n == target or n.endswith(f".{target}") for n in names):
                warnings.warn(
                    f"target_modules entry {target!r} matches no linear of this model.{near([target], names)}",
                    stacklevel=3,
                )


def near(targets: Any, names: list[str]) -> str:
    """A hint with the names closest to what was asked for."""
    leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
    asked = [targets] if isinstance(targets, str) else sorted(targets or [])
    close = {
        c for a in asked for c in difflib.get_close_matches(a.rsplit(".", 1)[-1], leaves, 3, 0.4)
    }
    hint = f" Near names: {', '.join(sorted(close))}." if close else ""
    return f"{hint} Linears of this model: {', '.join(leaves)}; or 'all-linear'"
