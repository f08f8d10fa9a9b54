"""The part of select that judges what is no canonical product: is it a product with a weight all the same?"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.flops import flops
from ..graph.nodes import VIEWS_AND_CASTS, args_of, aten, parameter_behind, weight_like
from ..graph.site import Skipped
from ..linears.einsum import spelling
from ..linears.spellings import SPELLINGS

UNRECOGNISED = "unrecognised product with a weight"


COMPUTED = "the weight is computed, not a parameter"

HARMLESS = frozenset(
    {
        aten.embedding.default,
        aten.index.Tensor,
        aten.index_select.default,
        aten.gather.default,
        aten.cat.default,
        aten.stack.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.batch_norm.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.roll.default,
        aten.sum.dim_IntList,
        aten.mean.dim,
        aten.pad.default,
        aten.upsample_bicubic2d.vec,
        aten.upsample_bilinear2d.vec,
        aten.upsample_nearest2d.vec,
        aten.zeros_like.default,
        aten.sym_size.int,
        aten.triu.default,
        aten.tril.default,
        aten.linalg_vector_norm.default,
        aten.norm.ScalarOpt_dim,
        aten._weight_norm.default,
        aten.softmax.int,
        aten.cumsum.default,
        aten.flip.default,
        aten.index_put.default,
        aten.expand_as.default,
        aten.view_as.default,
        aten.tile.default,
        aten.unfold.default,
        aten.instance_norm.default,
        aten.grid_sampler.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.std.correction,
        aten.var.correction,
    }
)
"""Read a parameter of two or more dimensions and are no product."""


def unrecognised(node: fx.Node) -> Skipped | None:
    """A product qlora_fx has no canonical form for; None for what is no product with a weight."""
    found = map(parameter_behind, node.all_input_nodes)
    weights = [p for p in found if p is not None and weight_like(p)]
    if not weights:
        return computed(node)
    if node.target in VIEWS_AND_CASTS or node.target in HARMLESS:
        return None
    if is_pointwise(node) and not is_multiplied_and_summed(node):
        return None
    weight = weights[0]
    key = weight.meta["stored"]
    if all(p.meta["val"].numel() == 0 for p in weights):
        return None
    op = spelling(node)
    if "conv" in op:
        window = list(weight.meta["val"].shape[2:])
        groups = weight.meta["val"].shape[1] != args_of(node)[0].meta["val"].shape[1]
        kind = ", in groups" if groups else ""
        reason = f"convolutions stay dense (window {'x'.join(map(str, window))}{kind})"
    else:
        reason = f"{UNRECOGNISED} ({op})"
    return Skipped(key.removesuffix(".weight"), key, op, reason, flops(node))


def computed(node: fx.Node) -> Skipped | None:
    """A verdict on a product with a weight that is computed from parameters (weight norm, a fused weight)."""
    if node.target not in SPELLINGS:
        return None
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor)]
    made = {n: behind(n) for n in tensors if n.op != "placeholder" and n.meta["val"].dim() >= 2}
    read = sorted({p.meta["stored"] for found in made.values() for p in found})
    if not read or all(made.get(n) for n in tensors if n.meta["val"].dim() >= 2):
        return None
    op = spelling(node)
    reason = f"{COMPUTED} ({', '.join(read)})"
    if "conv" in op:
        reason = f"convolutions stay dense ({reason})"
    return Skipped(node.meta.get("module") or node.name, read[0], op, reason, flops(node))


def is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_multiplied_and_summed(node: fx.Node) -> bool:
    """``(x * weight).sum(...)``: a product of matrices in two steps."""
    if node.target is not aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return False
    found = [weight_like(parameter_behind(a)) for a in node.args]
    if sum(found) != 1:
        return False
    weight = args_of(node)[found.index(True)]
    if sum(not statically_known_true(s == 1) for s in weight.meta["val"].shape) < 2:
        return False
    users = list(node.users)
    return any(u.target in (aten.sum.dim_IntList, aten.sum.default) for u in users)


def behind(node: Any) -> set[fx.Node]:
    """Stored weights that a computed weight is made of; empty if an input of the model has a part in it."""
    found: set[fx.Node] = set()
    todo, seen = [node], {node}
    while todo:
        at = todo.pop()
        if at.op == "placeholder":
            if "stored" not in at.meta:
                return set()
            if weight_like(at):
                found.add(at)
        for arg in at.all_input_nodes:
            if arg not in seen:
                seen.add(arg)
                todo.append(arg)
    return found
