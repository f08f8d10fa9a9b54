"""The part of select that tells a router from other linears."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from ..graph.nodes import VIEWS_AND_CASTS, aten
from .unrecognised import is_pointwise

CHOICES = frozenset(
    {aten.topk.default, aten.argmax.default, aten.max.dim, aten.sort.default, aten.sort.stable}
)


ROUTING = VIEWS_AND_CASTS | {
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten.scatter.src,
    aten.scatter.value,
    aten.masked_fill.Scalar,
    aten.sum.dim_IntList,
}


def is_router(node: fx.Node, experts: Collection[str]) -> bool:
    """True if the result is what chooses experts: it goes into a top-k next to a set of experts.

    Args:
        experts: store keys of the model's expert weights.
    """
    path = node.meta.get("module", "")
    near = [path.rsplit(".", n)[0] for n in (1, 2) if path.count(".") >= n]
    if not any(k.startswith(f"{p}.") for k in experts for p in near):
        return False
    todo, seen = [node], {node}
    while todo:
        for user in todo.pop().users:
            if user.target in CHOICES:
                return True
            if user not in seen and (is_pointwise(user) or user.target in ROUTING):
                seen.add(user)
                todo.append(user)
    return False
