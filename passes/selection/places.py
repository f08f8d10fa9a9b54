"""Which module holds a weight, in PEFT's terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ..graph.nodes import CANONICAL, weight_view
from ..graph.site import WeightView


@dataclass(frozen=True)
class Place:
    """Where a weight is. ``kind``, ``swapped`` and ``module_runs`` as in ``Site``."""

    name: str
    kind: str
    swapped: bool = False
    module_runs: bool = True


class Places:
    """Finds the places of one graph's weights.

    Args:
        stored: the graph's placeholders by store key.
    """

    def __init__(self, gm: fx.GraphModule, stored: Mapping[str, fx.Node]) -> None:
        self.stored = stored
        self.holders: Mapping[str, str] = gm.meta.get("holders", {})
        self.transposed: frozenset[str] = gm.meta.get("transposed_stacks", frozenset())
        self.running = {
            m for n in gm.graph.nodes if n.target in CANONICAL if (m := own_module(n)) is not None
        }
        """Modules that multiply by their own weight somewhere in the graph."""

    def __call__(self, node: fx.Node, view: WeightView) -> Place:
        """The module that is this linear, as PEFT names it; where there is none, the parameter's own path.

        The two differ for a tied weight: the head of a model is ``lm_head`` though its weight is stored as
        ``model.embed_tokens.weight``.
        """
        path = node.meta.get("module", "")
        owner, _, leaf = view.key.rpartition(".")
        # A linear in groups, which is a stack here, is none of PEFT's linears.
        is_matrix = leaf == "weight" and len(view.layout.shape) == 2
        if is_matrix and self.holders.get(path) in ("linear", "conv"):
            return Place(path, self.holders[path])
        if is_matrix and self.holders.get(owner) in ("linear", "conv"):
            if owner in self.running:  # the module runs by itself, this is someone else
                return Place(f"{owner} (read by {path or node.name})", "reader")
            return Place(owner, self.holders[owner], module_runs=False)
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


def own_module(node: fx.Node) -> str | None:
    """The module whose own weight the product reads, if the product is in it."""
    view = weight_view(node.args[1])
    path = node.meta.get("module", "")
    return path if view is not None and view.key == f"{path}.weight" else None
