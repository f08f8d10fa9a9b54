"""select: give every product with a weight its verdict. Later stages only look at the mark."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..errors import ConfigError
from ..transformers_internals import check_target_module_exists
from .graph.flops import flops
from .graph.nodes import CANONICAL, VIEWS_AND_CASTS, aten, placeholders, sites, weight_view
from .graph.site import Site, WeightView, is_flipped
from .linears.einsum import spelling
from .selection.routers import is_router
from .selection.targets import check_targets, is_excluded, targeted_parameter
from .selection.unrecognised import COMPUTED, UNRECOGNISED, behind, unrecognised
from .thaw import is_saved

TRAINS = "trains as a whole (modules_to_save)"


def select(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Mark each product with a weight with ``meta["site"]``; computes nothing, adds no node.

    A node that reads a parameter of two or more dimensions and is neither a canonical product nor known to
    be something else (an embedding, a norm, a pointwise operation) gets a verdict too: nothing is passed over.

    Before::

        %q_proj: f32[B, S, 8] = aten.linear(%x, %q_proj_weight)

    After::

        %q_proj: f32[B, S, 8] = aten.linear(%x, %q_proj_weight)  # site q_proj: quantize, adapt r=16

    Raises:
        ConfigError: if a LoRA target matches nothing, or only what cannot be adapted, or a rank is larger
            than a weight's dimension.
    """
    judge = Judge(gm, config)
    verdicts: dict[fx.Node, Site] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function" or "site" in node.meta:
            continue
        site = judge(node)
        if site is not None:
            verdicts[node] = site
    if config.decided is None:
        keep_shared_weights_dense(verdicts)
        found = [n.meta["site"] for n in sites(gm.graph)] + [*verdicts.values()]
        check_targets(config, found, judge.holders)
    told: set[str] = set()
    for node, site in verdicts.items():
        node.meta["site"] = site
        if config.decided is None and site.reason.startswith((UNRECOGNISED, f"{COMPUTED} (")):
            told.add(f"{site.name}: {site.reason}")
    for message in sorted(told):
        warnings.warn(f"{message}; it stays dense and unadapted", stacklevel=2)
    return PassResult(gm, bool(verdicts))


def keep_shared_weights_dense(verdicts: dict[fx.Node, Site]) -> None:
    """A weight is stored once: where one of its readers needs it dense, all read it dense."""
    dense = {s.weight for s in verdicts.values() if s.layout is not None and not s.quantize}
    for node, site in verdicts.items():
        if site.quantize and site.weight in dense:
            reason = "another reader of the weight keeps it dense"
            verdicts[node] = replace(
                site, quantize=False, reason="; ".join(filter(None, (reason, site.reason)))
            )


@dataclass(frozen=True)
class Place:
    """Which module holds a weight, in PEFT's terms. ``kind`` and ``swapped`` as in ``Site``."""

    name: str
    kind: str
    swapped: bool = False


class Judge:
    """Gives verdicts on the nodes of one graph."""

    def __init__(self, gm: fx.GraphModule, config: Any) -> None:
        self.config = config
        self.holders: Mapping[str, str] = gm.meta.get("holders", {})
        self.transposed: frozenset[str] = gm.meta.get("transposed_stacks", frozenset())
        self.stored = {n.meta["stored"]: n for n in placeholders(gm.graph) if "stored" in n.meta}
        stacks = (weight_view(n.args[1]) for n in gm.graph.nodes if n.target in CANONICAL)
        self.experts = {k for k in self.stored if "expert" in k} | {
            v.key for v in stacks if v is not None and len(v.layout.shape) == 3
        }
        self.running = {
            m for n in gm.graph.nodes if n.target in CANONICAL if (m := own_module(n)) is not None
        }
        """Modules that multiply by their own weight somewhere in the graph."""
        self.layouts: dict[str, Any] = {}
        """The layout in which each quantized weight is stored: that of its first reader."""

    def __call__(self, node: fx.Node) -> Site | None:
        if node.target in CANONICAL:
            return self.product(node)
        if node.target is aten.embedding.default:
            return self.embedding(node)
        return unrecognised(node)

    # -- canonical products -----------------------------------------------------------------------

    def product(self, node: fx.Node) -> Site:
        view = weight_view(node.args[1])
        op = node.meta.get("op", spelling(node))
        if view is None:
            name = node.meta.get("module") or node.name
            read = sorted({n.meta["stored"] for n in behind(node.args[1])})
            reason = f"{COMPUTED} ({', '.join(read)})" if read else COMPUTED
            return Site(name, read[0] if read else "", op, reason=reason, flops=flops(node))
        place = self.place(node, view)
        site = Site(place.name, view.key, op, view.layout, place.kind, flops=flops(node))
        if self.config.decided is not None:
            decided: Site | None = self.config.decided.get(place.name)
            if decided is not None:
                return replace(decided, op=op, flops=site.flops)
            later = "not adapted: not in the graph that transform captured"
            for other in self.config.decided.values():
                if other.weight == view.key and other.quantize:
                    return replace(site, layout=other.layout, quantize=True, reason=later)
            return replace(site, reason=later)
        router = is_router(node, self.experts)
        dense = self.why_dense(view, place.name, node, router)
        bare = self.why_bare(view, place, router)
        site = replace(
            site, quantize=not dense, adapt=not bare, reason="; ".join(filter(None, (dense, bare)))
        )
        if site.quantize:
            site = replace(site, layout=self.layouts.setdefault(view.key, view.layout))
        site = replace(site, swapped=place.swapped != is_flipped(view, site))
        return self.ranked(site) if site.adapt else site

    def ranked(self, site: Site) -> Site:
        """The site with its rank; bare if nobody asked for it by name and the rank is too large for it."""
        config = self.config
        r = config.rank(site.name)
        smaller = min(site.out_features, site.in_features)
        if r > smaller:
            if config.lora.target_modules in (None, "all-linear"):
                bare = f"not adapted: r={r} is larger than its smaller dimension {smaller}"
                return replace(
                    site, adapt=False, reason="; ".join(filter(None, (site.reason, bare)))
                )
            raise ConfigError(
                f"LoRA rank r={r} is larger than the smaller dimension of {site.name} "
                f"[{site.out_features}, {site.in_features}]; accepted: at most {smaller}. "
                "Lower r, or give this module its own rank in rank_pattern"
            )
        dropout = float(config.lora.lora_dropout)
        return replace(site, r=r, scaling=config.scaling(site.name), dropout=dropout)

    def place(self, node: fx.Node, view: WeightView) -> Place:
        """The module that is this linear, as PEFT names it; where there is none, the parameter's own path.

        The two differ for a tied weight: the head of a model is ``lm_head`` though its weight is stored as
        ``model.embed_tokens.weight``.
        """
        path = node.meta.get("module", "")
        owner, _, leaf = view.key.rpartition(".")
        plain = (
            leaf == "weight" and len(view.layout.shape) == 2
        )  # no linear in groups, which PEFT takes for one
        if plain and self.holders.get(path) in ("linear", "conv"):
            return Place(path, self.holders[path])
        if plain and self.holders.get(owner) in ("linear", "conv"):
            if owner in self.running:  # the module runs by itself, this is someone else
                return Place(f"{owner} (read by {path or node.name})", "reader")
            return Place(owner, self.holders[owner])
        name = view.key.removesuffix(".weight")
        raw = tuple(self.stored[view.key].meta["val"].shape)
        permute = view.layout.permute
        if view.layout.view != raw or len(permute) != len(raw) or len(raw) > 3:
            return Place(name, "own")
        if len(raw) == 2:
            return Place(name, "parameter" if owner else "own", permute == (1, 0))
        if permute[0] != 0 or len(view.layout.shape) != 3 or not owner:
            return Place(name, "own")
        inner = 1 if owner in self.transposed else 2
        return Place(name, "parameter", permute[2] != inner)

    def why_dense(self, view: WeightView, name: str, node: fx.Node, router: bool) -> str:
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
        for skipped in config.quantization.skip:
            if name == skipped or name.endswith(f".{skipped}") or name.startswith(f"{skipped}."):
                return f"listed in llm_int8_skip_modules ({skipped})"
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

    def why_bare(self, view: WeightView, place: Place, router: bool) -> str:
        """Why this linear gets no LoRA branch; empty if it does."""
        lora = self.config.lora
        if is_saved(view.key, lora.modules_to_save or ()):
            return "not adapted"
        if place.kind == "reader":
            return "not adapted: PEFT adapts the module that owns the weight, not its other readers"
        if targeted_parameter(lora, view.key):
            return ""
        if lora.target_modules is None or lora.target_modules == "all-linear":
            if view.key in self.config.output_heads:
                return "not adapted: 'all-linear' leaves the output head out"
            if router:
                return "not adapted: 'all-linear' leaves routers out"
            if lora.exclude_modules and is_excluded(lora, place.name):
                return "not adapted: in exclude_modules"
            return ""
        if lora.target_modules and check_target_module_exists(lora, place.name):
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
        if self.config.decided is not None:
            decided: Site | None = self.config.decided.get(f"{name} (lookup)")
            return decided
        if key not in self.config.input_embeddings or "embeddings" not in self.config.also_quantize:
            return None
        view = weight_view(weight)
        assert view is not None
        dense = ""
        if key in self.config.output_heads and "head" not in self.config.also_quantize:
            dense = "tied to the output head; also_quantize=['head', 'embeddings'] quantizes both"
        elif self.layouts.get(key, view.layout) != view.layout:
            dense = "the weight is stored in another layout"
        reason = "; ".join(filter(None, (dense, "not adapted: an embedding")))
        return Site(
            f"{name} (lookup)",
            key,
            "embedding",
            self.layouts.setdefault(key, view.layout),
            "embedding",
            not dense,
            reason=reason,
        )


def own_module(node: fx.Node) -> str | None:
    """The module whose own weight the product reads, if the product is in it."""
    view = weight_view(node.args[1])
    path = node.meta.get("module", "")
    return path if view is not None and view.key == f"{path}.weight" else None


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
