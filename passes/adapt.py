"""adapt: give every adapted site its LoRA branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .graph.nodes import (
    GROUPED,
    Emitter,
    StoredInputs,
    arguments,
    aten,
    cast,
    fake_mode,
    ops,
    replace_other_uses,
    sites,
    weight_view,
)
from .graph.site import Site, WeightView, is_flipped
from .thaw import TRAINED

ADAPTER_DTYPE = torch.float32
"""Adapters are stored in float32, as PEFT does by default."""


def branch_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of the branch's products: that of the activations, whose rounding it joins, but never float16.

    In bfloat16 our error beside float64 is no larger than PEFT's with float32 products (tests/peers): what
    the products round, the activations have rounded before. float16 has too little range for gradients.
    """
    return torch.bfloat16 if activations == torch.bfloat16 else ADAPTER_DTYPE


def adapt(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Add ``scaling * (dropout(x) A^T) B^T`` (LoRA, arXiv:2106.09685) to the result of each site.

    Before::

        %q_proj: f32[B, S, 6] = aten.linear(%x, %q_proj_dequant)

    After::

        %q_proj: f32[B, S, 6] = aten.linear(%x, %q_proj_dequant)
        %q_proj_lora_a: f32[B, S, 2] = aten.linear(%x, %q_proj_lora_A_weight)
        %q_proj_lora_b: f32[B, S, 6] = aten.linear(%q_proj_lora_a, %q_proj_lora_B_weight)
        %q_proj_scaled: f32[B, S, 6] = aten.mul(%q_proj_lora_b, 2.0)
        %q_proj_adapted: f32[B, S, 6] = aten.add(%q_proj, %q_proj_scaled)

    For a stack of experts both products are ``qlora_fx.grouped_linear`` over the same groups of rows.
    """
    todo = [n for n in sites(gm.graph) if n.meta["site"].adapt and not has_branch(n)]
    inputs = StoredInputs(gm.graph)
    for node in todo:
        add_branch(gm.graph, node, inputs, config)
    return PassResult(gm, bool(todo))


def lora_keys(site: Site) -> tuple[str, str]:
    """Store keys of ``lora_A`` and ``lora_B``; ``Site.lora_shapes`` gives their shapes.

    ``<module>.lora_A.weight``; for a parameter of a module that is no linear, ``<module>.lora_A.<parameter>``.
    """
    if site.kind in ("linear", "conv"):
        return f"{site.name}.lora_A.weight", f"{site.name}.lora_B.weight"
    owner, _, leaf = site.weight.rpartition(".")
    owner = f"{owner}." if owner else ""
    return f"{owner}lora_A.{leaf}", f"{owner}lora_B.{leaf}"


def is_adapter_key(key: str) -> bool:
    """True for the store keys that ``lora_keys`` makes, and for copies that train (thaw.py)."""
    return not {"lora_A", "lora_B", TRAINED}.isdisjoint(key.split(".")[:-1])


def has_branch(linear: fx.Node) -> bool:
    return any(user.meta.get("branch_of") is not None for user in result_of(linear).users)


def result_of(linear: fx.Node) -> fx.Node:
    """The linear's result in the activations' dtype: itself, or the cast that quantize put behind it."""
    for user in linear.users:
        if "result_of" in user.meta:
            return user
    return linear


def add_branch(graph: fx.Graph, linear: fx.Node, inputs: StoredInputs, config: Any) -> None:
    site: Site = linear.meta["site"]
    view = linear.meta.get("weight_read") or weight_view(linear.args[1])
    assert view is not None
    result = result_of(linear)
    x: Any = linear.args[0]
    if "input_of" in x.meta:  # the branch takes the input as the model computed it, uncast
        x = x.args[0]
    name = linear.name
    device = linear.meta["val"].device
    with fake_mode(graph):
        vals = [
            torch.empty(shape, dtype=ADAPTER_DTYPE, device=device) for shape in site.lora_shapes()
        ]
    lora_a, lora_b = (inputs.add(key, val) for key, val in zip(lora_keys(site), vals, strict=True))
    for node in (lora_a, lora_b):
        node.meta["trainable"] = True

    then = Emitter(graph, linear)
    ends = ends_of(linear)
    following = result.next
    with graph.inserting_before(following):
        first, second = factors(site, view, lora_a, lora_b, then)
        dtype = branch_dtype(result.meta["val"].dtype)
        first = cast(graph, first, dtype, f"{name}_lora_A_low", like=linear)
        second = cast(graph, second, dtype, f"{name}_lora_B_low", like=linear)
        branch = cast(graph, x, dtype, f"{name}_lora_x", like=linear)
        if config.training and site.dropout > 0:
            branch = then(aten.dropout.default, branch, site.dropout, True, suffix="lora_dropout")
        for weight, suffix in ((first, "lora_a"), (second, "lora_b")):
            if ends is None:
                branch = then(aten.linear.default, branch, weight, suffix=suffix)
            else:
                branch = then(ops.grouped_linear.default, branch, weight, ends, suffix=suffix)
        if site.scaling != 1.0:
            branch = then(aten.mul.Tensor, branch, site.scaling, suffix="scaled")
        branch = cast(graph, branch, result.meta["val"].dtype, f"{name}_lora_result", like=linear)
        adapted = then(aten.add.Tensor, result, branch, suffix="adapted")
    adapted.meta["branch_of"] = site.name
    replace_other_uses(result, adapted)


def ends_of(node: fx.Node) -> Any:
    """Where each expert's rows end; None for an ordinary linear."""
    return arguments(node)["ends"] if node.target in GROUPED else None


def factors(
    site: Site, view: WeightView, a: fx.Node, b: fx.Node, then: Emitter
) -> tuple[fx.Node, fx.Node]:
    """``[(experts,) r, in]`` and ``[(experts,) out, r]`` from PEFT's ``lora_A`` and ``lora_B``.

    PEFT holds experts as ``[experts * r, in]`` and ``[out, r * experts]``, and a parameter that the model
    multiplies transposed with the roles of the two exchanged (``peft.tuners.lora.layer.ParamWrapper``).
    """
    (rows, columns, *window), (out, *_) = site.lora_shapes()
    if window:
        a = then(aten.reshape.default, a, [rows, columns], suffix="lora_a_matrix")
        b = then(aten.reshape.default, b, [out, rows], suffix="lora_b_matrix")
    if site.experts:
        a = then(aten.reshape.default, a, [site.experts, site.r, columns], suffix="lora_a_stack")
        b = then(aten.reshape.default, b, [out, site.r, site.experts], suffix="lora_b_stack")
        b = then(aten.permute.default, b, [2, 0, 1], suffix="lora_b_stack")
        if view.expert is not None:
            a = then(aten.select.int, a, 0, view.expert, suffix="lora_a_expert")
            b = then(aten.select.int, b, 0, view.expert, suffix="lora_b_expert")
    if site.swapped != is_flipped(view, site):
        a, b = (
            then(aten.transpose.int, factor, -2, -1, suffix=f"{which}_swapped")
            for factor, which in ((b, "lora_b"), (a, "lora_a"))
        )
    if view.rows is not None:
        b = then(aten.slice.Tensor, b, 0, *view.rows, suffix="lora_b_rows")
    return a, b
