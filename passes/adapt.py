"""adapt: give every adapted site its LoRA branch."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .nodes import Site, StoredInputs, aten, call, fake_mode, sites
from .quantize import cast, replace_other_uses

ADAPTER_DTYPE = torch.float32
"""Adapters are stored, and their two products computed, in float32, as PEFT does by default."""


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
    """
    todo = [n for n in sites(gm.graph) if n.meta["site"].adapt and not has_branch(n)]
    inputs = StoredInputs(gm.graph)
    for node in todo:
        add_branch(gm.graph, node, inputs, config)
    return PassResult(gm, bool(todo))


def lora_keys(site: Site) -> tuple[str, str]:
    """Store keys of ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]``."""
    return f"{site.name}.lora_A.weight", f"{site.name}.lora_B.weight"


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
    result = result_of(linear)
    x: Any = linear.args[0]
    if "input_of" in x.meta:  # the branch takes the input as the model computed it, uncast
        x = x.args[0]
    name = linear.name
    device = linear.meta["val"].device
    with fake_mode(graph):
        a_val = torch.empty(site.r, site.in_features, dtype=ADAPTER_DTYPE, device=device)
        b_val = torch.empty(site.out_features, site.r, dtype=ADAPTER_DTYPE, device=device)
    lora_a, lora_b = (
        inputs.add(key, val) for key, val in zip(lora_keys(site), (a_val, b_val), strict=True)
    )
    for node in (lora_a, lora_b):
        node.meta["trainable"] = True

    def then(target: Any, *args: Any, suffix: str) -> fx.Node:
        return call(graph, target, args, name=f"{name}_{suffix}", like=linear)

    following = result.next
    with graph.inserting_before(following):
        x = cast(graph, x, ADAPTER_DTYPE, f"{name}_lora_x", like=linear)
        if config.training and site.dropout > 0:
            x = then(aten.dropout.default, x, site.dropout, True, suffix="lora_dropout")
        branch = then(aten.linear.default, x, lora_a, suffix="lora_a")
        branch = then(aten.linear.default, branch, lora_b, suffix="lora_b")
        if site.scaling != 1.0:
            branch = then(aten.mul.Tensor, branch, site.scaling, suffix="scaled")
        branch = cast(graph, branch, result.meta["val"].dtype, f"{name}_lora_result", like=linear)
        adapted = then(aten.add.Tensor, result, branch, suffix="adapted")
    adapted.meta["branch_of"] = site.name
    replace_other_uses(result, adapted)
