"""few_rows: where a call continues what a cache holds, products read weights as they are stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from ..runtime.few_rows import takes_dense
from .graph.nodes import (
    Emitter,
    aten,
    is_from_cache,
    ops,
    placeholders,
    replace_other_uses,
    uncast,
    verdict_of,
)
from .graph.values import fake_value
from .schemes import Storage

Branch = tuple[Any, Any, float]
NO_BRANCH: Branch = (None, None, 0.0)


def few_rows(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """A product with a weight and its LoRA branch become one operator, in graphs that take a cache.

    Such a call has a row or a few for each sequence. The operator computes them without a dense weight where the weight
    is in storage; for many rows it makes the weight dense, as the nodes that it replaces. On a CPU products with dense
    weights (the output head) become ``qlora_fx.linear_dense``, for few rows a kernel too. Weights that are read
    transposed or in part, and branches of other forms, stay as they are.

    Before::

        %up_dequant: f32[64, 48] = bitsandbytes.dequantize_4bit(%up_weight_packed, %up_absmax_offset, 64, nf4, [64, 48], f32)
        %up: f32[B, S, 64] = aten.linear(%x, %up_dequant, %up_bias)
        %up_lora_a: f32[B, S, 2] = aten.linear(%x, %up_lora_A_weight)
        %up_lora_b: f32[B, S, 64] = aten.linear(%up_lora_a, %up_lora_B_weight)
        %up_scaled: f32[B, S, 64] = aten.mul(%up_lora_b, 2.0)
        %up_adapted: f32[B, S, 64] = aten.add(%up, %up_scaled)

    After::

        %up: f32[B, S, 64] = qlora_fx.linear_4bit(%x, %up_weight_packed, %up_weight_absmax, %up_weight_nested_absmax,
            %up_weight_offset, %nested_quant_map, %up_bias, %up_lora_A_weight, %up_lora_B_weight, 2.0, [64, 48], 64, nf4)
    """
    graph = gm.graph
    if not any(is_from_cache(node) for node in placeholders(graph)):
        return PassResult(gm, False)
    modified = False
    for node in list(graph.find_nodes(op="call_function", target=aten.linear.default)):
        modified |= rewrite(node) or as_matrix(graph, node)
    if modified:
        graph.eliminate_dead_code()
    return PassResult(gm, modified)


def rewrite(node: fx.Node) -> bool:
    """Let one operator read a weight as it is stored, and add the branch."""
    x, weight, *rest = node.args
    if not isinstance(weight, fx.Node):
        return False
    made = weight.meta.get("storage")
    bias = rest[0] if rest else None
    adapted, branch = (None, NO_BRANCH) if branches_stay(node) else branch_of(node)
    product = None
    if isinstance(made, Storage):
        shape = [int(n) for n in weight.meta["val"].shape]
        product = made.emission.product(x, made.parts, bias, branch, shape)
    elif is_dense_weight(node, weight):
        product = ops.linear_dense.default, (x, weight, bias, *branch)
    if product is None:
        return False
    node.target, node.args = product
    if adapted is not None:
        adapted.replace_all_uses_with(node)
    return True


def is_dense_weight(node: fx.Node, weight: fx.Node) -> bool:
    """Whether a product is with a whole weight of the model's that the kernel for dense ones takes."""
    if weight.op != "placeholder" or verdict_of(node) is None:
        return False
    val: torch.Tensor = weight.meta["val"]
    return val.device.type == "cpu" and takes_dense(int(val.shape[1]), val.dtype)


def branches_stay(node: fx.Node) -> bool:
    val: torch.Tensor = node.meta["val"]
    return val.is_cuda


def branch_of(node: fx.Node) -> tuple[fx.Node | None, Branch]:
    """The sum that is all a product is read by, and the factors and scaling of what it adds; None if it is no LoRA's."""
    users = list(node.users)
    if len(users) != 1 or "branch_of" not in users[0].meta or users[0].args[0] is not node:
        return None, NO_BRANCH
    at, scaling = uncast(users[0].args[1]), 1.0
    if at.target is aten.mul.Tensor:
        factor: Any = at.args[1]
        if isinstance(factor, fx.Node):
            return None, NO_BRANCH
        at, scaling = uncast(at.args[0]), factor
    if at.target is not aten.linear.default:
        return None, NO_BRANCH
    low, b = uncast(at.args[0]), uncast(at.args[1])
    if low.target is not aten.linear.default or uncast(low.args[0]) is not uncast(node.args[0]):
        return None, NO_BRANCH
    a = uncast(low.args[1])
    if a.op != "placeholder" or b.op != "placeholder":
        return None, NO_BRANCH
    return users[0], (a, b, scaling)


def as_matrix(graph: fx.Graph, node: fx.Node) -> bool:
    """Multiply ``[batch, 1, in]`` as ``[batch, in]``: otherwise PyTorch multiplies each row by a copy of the weight."""
    x, val = node.args[0], node.meta["val"]
    if not isinstance(x, fx.Node) or val.dim() != 3 or isinstance(val.shape[1], torch.SymInt):
        return False
    emit = Emitter(graph, node)
    with graph.inserting_before(node):
        rows = emit(aten.reshape.default, x, [-1, x.meta["val"].shape[-1]], suffix="rows")
    node.args = (rows, *node.args[1:])
    node.meta["val"] = fake_value(graph, node.target, node.args, {})
    with graph.inserting_after(node):
        sizes = [-1, *(int(n) for n in val.shape[1:])]
        tokens = emit(aten.reshape.default, node, sizes, suffix="tokens")
    replace_other_uses(node, tokens)
    return True
