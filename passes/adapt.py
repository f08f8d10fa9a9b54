"""adapt: give every adapted site its adapter."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from .adapters import ADAPTER_DTYPE, ROLES, SLOT_OF_ROW, Product, adapter_of
from .graph.nodes import (
    FEW_ROWS,
    GROUPED,
    Emitter,
    StoredInputs,
    arguments,
    placeholders,
    sites,
    weight_view,
)
from .graph.site import Site
from .graph.values import fake_empty
from .thaw import TRAINED


def adapt(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Join an adapter to the result of each site: for LoRA add ``scaling * (dropout(x) A^T) B^T`` (arXiv:2106.09685).

    Which nodes those are is the adapter's to say (adapters/).

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
    slots = slot_of_row(gm.graph) if config.slots else None
    for node in todo:
        add_branch(gm.graph, node, inputs, config, slots)
    return PassResult(gm, bool(todo))


def is_adapter_key(key: str) -> bool:
    """True for the store keys of adapters' tensors, and of copies that train (thaw.py)."""
    return not (ROLES | {TRAINED}).isdisjoint(key.split(".")[:-1])


def has_branch(linear: fx.Node) -> bool:
    if linear.target in FEW_ROWS and arguments(linear)["lora_a"] is not None:
        return True  # inside
    return any(user.meta.get("branch_of") is not None for user in result_of(linear).users)


def result_of(linear: fx.Node) -> fx.Node:
    """The linear's result in the activations' dtype: itself, or the cast that quantize put behind it."""
    for user in linear.users:
        if "result_of" in user.meta:
            return user
    return linear


def add_branch(
    graph: fx.Graph,
    linear: fx.Node,
    inputs: StoredInputs,
    config: Config,
    slots: fx.Node | None,
) -> None:
    site: Site = linear.meta["site"]
    view = linear.meta.get("weight_read") or weight_view(linear.args[1])
    assert view is not None
    result = result_of(linear)
    x: Any = linear.args[0]
    if "input_of" in x.meta:  # the branch takes the input as the model computed it, uncast
        x = x.args[0]
    dropout = site.dropout if config.training else 0.0
    product = Product(linear, site, view, x, result, ends_of(linear), dropout, slots)
    adapter, device = adapter_of(config.lora, config.slots), linear.meta["val"].device
    held: dict[str, fx.Node] = {}
    for role, tensor in adapter.tensors(site).items():
        val = fake_empty(graph, tensor.shape, ADAPTER_DTYPE, device)
        held[role] = inputs.add(tensor.key, val)
        held[role].meta["trainable"] = is_adapter_key(tensor.key)
    readers = set(result.users)
    with graph.inserting_before(result.next):
        adapted = adapter.emit(product, held, Emitter(graph, linear))
    adapted.meta["branch_of"] = site.name
    result.replace_all_uses_with(adapted, delete_user_cb=readers.__contains__)


def slot_of_row(graph: fx.Graph) -> fx.Node:
    """The input that says which adapter each row of the batch has."""
    return next(n for n in placeholders(graph) if n.meta.get("input") == SLOT_OF_ROW)


def ends_of(node: fx.Node) -> fx.Node | None:
    """Where each expert's rows end; None for an ordinary linear."""
    return arguments(node)["ends"] if node.target in GROUPED else None
