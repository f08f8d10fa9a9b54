"""select: give every product with a weight its verdict. Later stages only look at the mark."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from ..errors import ConfigError
from .graph.flops import flops
from .graph.nodes import (
    CANONICAL,
    VIEWS_AND_CASTS,
    aten,
    mark,
    placeholders,
    verdict_of,
    verdicts,
    weight_view,
)
from .graph.site import Layout, Site, Skipped, Verdict, WeightView, is_flipped
from .linears.einsum import spelling
from .selection.places import Place, Places
from .selection.routers import is_router
from .selection.targets import check_targets, is_excluded, is_targeted
from .selection.unrecognised import COMPUTED, UNRECOGNISED, behind, unrecognised
from .thaw import is_saved

TRAINS = "trains as a whole (modules_to_save)"


def select(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Mark each product with a weight with ``meta["site"]``; computes nothing, adds no node.

    A node that reads a parameter of two or more dimensions and is neither a canonical product nor known to
    be something else (an embedding, a norm, a pointwise operation) gets ``meta["skipped"]``: nothing is passed
    over.

    Before::

        %q_proj: f32[B, S, 8] = aten.linear(%x, %q_proj_weight)

    After::

        %q_proj: f32[B, S, 8] = aten.linear(%x, %q_proj_weight)  # site q_proj: quantize, adapt r=16

    Raises:
        ConfigError: if a LoRA target matches nothing, or only what cannot be adapted, or a rank is larger
            than a weight's dimension.
    """
    judge = Judge(gm, config)
    new: dict[fx.Node, Verdict] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or verdict_of(node) is not None:
            continue
        verdict = judge(node)
        if verdict is not None:
            new[node] = verdict
    if config.decided is None:
        keep_shared_weights_dense(new)
    for node, verdict in new.items():
        mark(node, verdict)
    if config.decided is None:
        check_targets(config, list(verdicts(gm.graph)), judge.places.holders)
        warn_of_skipped(new.values())
    return PassResult(gm, bool(new))


def keep_shared_weights_dense(new: dict[fx.Node, Verdict]) -> None:
    """A weight is stored once: where one of its readers needs it dense, all read it dense."""
    found = {node: verdict for node, verdict in new.items() if isinstance(verdict, Site)}
    dense = {site.weight for site in found.values() if not site.quantize}
    for node, site in found.items():
        if site.quantize and site.weight in dense:
            reason = one_reason("another reader of the weight keeps it dense", site.reason)
            new[node] = replace(site, quantize=False, reason=reason)


def warn_of_skipped(new: Iterable[Verdict]) -> None:
    """Warn once of each product with a weight that nothing here knows."""
    reasons = (UNRECOGNISED, f"{COMPUTED} (")
    messages = {
        f"{verdict.name}: {verdict.reason}"
        for verdict in new
        if isinstance(verdict, Skipped) and verdict.reason.startswith(reasons)
    }
    for message in sorted(messages):
        warnings.warn(f"{message}; it stays dense and unadapted", stacklevel=3)


def one_reason(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


class Judge:
    """Gives verdicts on the nodes of one graph."""

    def __init__(self, gm: fx.GraphModule, config: Config) -> None:
        self.config = config
        self.decided: Mapping[str, Site] | None = config.decided
        self.stored = {n.meta["stored"]: n for n in placeholders(gm.graph) if "stored" in n.meta}
        stacks = (weight_view(n.args[1]) for n in gm.graph.nodes if n.target in CANONICAL)
        self.experts = {k for k in self.stored if "expert" in k} | {
            v.key for v in stacks if v is not None and len(v.layout.shape) == 3
        }
        self.places = Places(gm, self.stored)
        self.layouts: dict[str, Layout] = {}
        """The layout in which each quantized weight is stored: that of its first reader."""

    def __call__(self, node: fx.Node) -> Verdict | None:
        if node.target in CANONICAL:
            return self.product(node)
        if node.target is aten.embedding.default:
            return self.embedding(node)
        return unrecognised(node)

    # -- canonical products -----------------------------------------------------------------------

    def product(self, node: fx.Node) -> Verdict:
        view = weight_view(node.args[1])
        op = node.meta.get("op", spelling(node))
        if view is None:
            name = node.meta.get("module") or node.name
            read = sorted({n.meta["stored"] for n in behind(node.args[1])})
            reason = f"{COMPUTED} ({', '.join(read)})" if read else COMPUTED
            return Skipped(name, read[0] if read else "", op, reason, flops(node))
        place = self.places(node, view)
        site = Site(
            place.name,
            view.key,
            op,
            view.layout,
            place.kind,
            module_runs=place.module_runs,
            flops=flops(node),
        )
        if self.decided is not None:
            return as_decided(site, self.decided)
        router = is_router(node, self.experts)
        dense = self.why_dense(view, place.name, router)
        unadapted = self.why_unadapted(view, place, router)
        reason = one_reason(dense, unadapted)
        site = replace(site, quantize=not dense, adapt=not unadapted, reason=reason)
        if site.quantize:
            site = replace(site, layout=self.layouts.setdefault(view.key, view.layout))
        site = replace(site, swapped=place.swapped != is_flipped(view, site))
        return ranked(site, self.config) if site.adapt else site

    def why_dense(self, view: WeightView, name: str, router: bool) -> str:
        """Why this weight is not quantized; empty if it is."""
        config = self.config
        key = view.key
        if config.quantization.is_dense:
            return "quantization=False"
        if key in config.stored:
            return self.other_readers(self.stored[key], view)
        if key in config.kept:
            return "dense in the checkpoint"
        if is_saved(key, config.lora.modules_to_save or ()):
            return TRAINS
        if key in config.output_heads and "head" not in config.also_quantize:
            return "output head stays dense"
        if router and "routers" not in config.also_quantize:
            return "router stays dense"
        for path in config.quantization.skip:
            if name == path or name.endswith(f".{path}") or name.startswith(f"{path}."):
                return f"listed in llm_int8_skip_modules ({path})"
        weight = self.stored[key]
        val = weight.meta["val"]
        if val.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"a weight of {val.dtype} cannot be quantized to 4 bits"
        return self.other_readers(weight, view)

    def other_readers(self, weight: fx.Node, view: WeightView) -> str:
        """Why the weight must stay dense for someone else who reads it; empty if nobody does."""
        others = set()
        for reader, arg in readers(weight):
            if reader.target in CANONICAL and reader.args[1] is arg:
                seen = weight_view(arg)
                if seen is None:
                    others.add(spelling(reader))
                elif seen.layout != view.layout and 3 in (
                    len(seen.layout.shape),
                    len(view.layout.shape),
                ):
                    others.add(f"{spelling(reader)} in another layout")
            elif reader.target is aten.embedding.default and arg is weight:
                if "embeddings" not in self.config.also_quantize:
                    others.add("embedding (also_quantize=['embeddings'] stores that in 4 bits)")
            else:
                others.add(spelling(reader))
        return f"the weight is also read by {', '.join(sorted(others))}" if others else ""

    def why_unadapted(self, view: WeightView, place: Place, router: bool) -> str:
        """Why this linear gets no LoRA branch; empty if it gets one."""
        lora = self.config.lora
        if is_saved(view.key, lora.modules_to_save or ()):
            return "not adapted"
        if place.kind == "reader":
            return "not adapted: PEFT adapts the module that owns the weight, not its other readers"
        wanted = is_targeted(lora, place.name, view.key)
        if wanted:
            return ""
        if lora.target_modules in (None, "all-linear"):
            if view.key in self.config.output_heads:
                return "not adapted: 'all-linear' leaves the output head out"
            if router:
                return "not adapted: 'all-linear' leaves routers out"
            if wanted is None:
                return ""
        if lora.exclude_modules and is_excluded(lora, place.name):
            return "not adapted: in exclude_modules"
        return "not adapted: not in target_modules"

    # -- everything else that reads a parameter ---------------------------------------------------

    def embedding(self, node: fx.Node) -> Site | None:
        """A verdict only where the user asked for 4-bit embeddings."""
        weight = node.args[0]
        if not isinstance(weight, fx.Node) or weight.meta.get("stored") is None:
            return None
        key = weight.meta["stored"]
        name = key.removesuffix(".weight")
        if self.decided is not None:
            return self.decided.get(f"{name} (lookup)")
        if key not in self.config.input_embeddings or "embeddings" not in self.config.also_quantize:
            return None
        view = weight_view(weight)
        assert view is not None
        dense = ""
        if key in self.config.output_heads and "head" not in self.config.also_quantize:
            dense = "tied to the output head; also_quantize=['head', 'embeddings'] quantizes both"
        elif self.layouts.get(key, view.layout) != view.layout:
            dense = "the weight is stored in another layout"
        return Site(
            f"{name} (lookup)",
            key,
            "embedding",
            self.layouts.setdefault(key, view.layout),
            "embedding",
            quantize=not dense,
            reason=one_reason(dense, "not adapted: an embedding"),
        )


def ranked(site: Site, config: Config) -> Site:
    """The site with its rank; unadapted if nobody asked for it by name and the rank is too large for it.

    Raises:
        ConfigError: the rank is too large for what was asked for by name.
    """
    r = config.rank(site.name)
    smaller = min(site.out_features, site.in_features)
    if r > smaller:
        if config.lora.target_modules in (None, "all-linear"):
            unadapted = f"not adapted: r={r} is larger than its smaller dimension {smaller}"
            return replace(site, adapt=False, reason=one_reason(site.reason, unadapted))
        raise ConfigError(
            f"LoRA rank r={r} is larger than the smaller dimension of {site.name} "
            f"[{site.out_features}, {site.in_features}]; accepted: at most {smaller}. "
            "Lower r, or give this module its own rank in rank_pattern"
        )
    dropout = float(config.lora.lora_dropout)
    return replace(site, r=r, scaling=config.scaling(site.name), dropout=dropout)


def as_decided(site: Site, decided: Mapping[str, Site]) -> Site:
    """The site as the first capture has it, or as far as that has its weight."""
    first = decided.get(site.name)
    if first is not None:
        return replace(first, op=site.op, flops=site.flops)
    reason = "not adapted: not in the graph that transform captured"
    for other in decided.values():
        if other.weight == site.weight and other.quantize:
            return replace(site, layout=other.layout, quantize=True, reason=reason)
    return replace(site, reason=reason)


def readers(weight: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Nodes that use the weight through any views and casts, each with the argument they read."""
    todo = [weight]
    while todo:
        at = todo.pop()
        for user in at.users:
            if user.target in VIEWS_AND_CASTS and user.args[0] is at:
                todo.append(user)
            else:
                yield user, at
