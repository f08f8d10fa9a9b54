"""attention: where a mask may be causal, skip what it hides."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..runtime.attention_kernels import devices
from .graph.nodes import Emitter, arguments, aten, call, is_from_cache, ops

Pair = tuple[fx.Node, fx.Node]
"""Of keys, or of values: those of a cache ``[tokens, batch, heads, size]``, and new ones ``[batch, heads, tokens, size]``."""
COMPARISONS = frozenset(
    {
        aten.le.Tensor,
        aten.lt.Tensor,
        aten.ge.Tensor,
        aten.gt.Tensor,
        aten.tril.default,
        aten.triu.default,
    }
)


def attention(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Attention over an explicit mask becomes ``qlora_fx.attention``, told at run time what the mask is.

    A captured model builds a mask of ``[sequence, sequence]`` and its kernel reads all of it. What the batch
    made of it is seen by ``mask_kind`` once per call: exactly causal, or anything else (padding, a window), of
    which the tiles that hide everything are skipped. Keys that a model repeats for its query heads are taken as
    they were before. Where no kernel of ours is for the device, PyTorch's are kept. On a GPU the look at the mask
    waits for the device, once per call of the model.

    Over a cache it becomes ``qlora_fx.cached_attention``, for which earlier and new keys are not joined.

    Before::

        %attn: f32[B, 4, S, 16] = aten.scaled_dot_product_attention(%q, %k, %v, %mask, scale=0.25)

    After::

        %mask_kind: i64[] = qlora_fx.mask_kind(%mask)
        %attn_causal: (f32[B, 4, S, 16], f32[B, 4, S]) = qlora_fx.attention(%q, %k, %v, %mask, %mask_kind, 0.25)
        %attn_result: f32[B, 4, S, 16] = getitem(%attn_causal, 0)
    """
    graph = gm.graph
    kinds: dict[fx.Node, fx.Node] = {}
    modified = False
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        modified |= rewrite(graph, node, kinds)
    if modified:
        graph.eliminate_dead_code()
    return PassResult(gm, modified)


def rewrite(graph: fx.Graph, node: fx.Node, kinds: dict[fx.Node, fx.Node]) -> bool:
    args = arguments(node)
    q, mask, scale = args["query"], args["attn_mask"], args["scale"]
    k, v = before_repeat(args["key"], q), before_repeat(args["value"], q)
    if args["dropout_p"]:
        return False
    if scale is None:
        scale = float(int(q.meta["val"].shape[-1]) ** -0.5)
    keys, values = joined(k), joined(v)
    if keys and values and mask_per_token(q, mask):
        emit = Emitter(graph, node)
        with graph.inserting_before(node):
            cached = ops.cached_attention.default
            result = emit(cached, q, *keys, *values, mask, scale, suffix="cached")
        node.replace_all_uses_with(result)
        graph.erase_node(node)
        return True
    if not may_be_causal(q, k, v, mask, args["is_causal"]):
        return False
    if mask is not None and mask not in kinds:
        with graph.inserting_after(mask):
            name = f"{mask.name}_kind"
            kinds[mask] = call(graph, ops.mask_kind.default, (mask,), name=name, like=mask)
    emit = Emitter(graph, node)
    with graph.inserting_before(node):
        pair = emit(ops.attention.default, q, k, v, mask, kinds.get(mask), scale, suffix="causal")
        result = emit(operator.getitem, pair, 0, suffix="result")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def mask_per_token(q: Any, mask: Any) -> bool:
    """True where a mask says which keys a token sees."""
    if mask is None:
        return False
    shape = mask.meta["val"].shape
    return q.meta["val"].dim() == 4 and len(shape) == 4 and not isinstance(shape[1], torch.SymInt)


def joined(t: Any) -> Pair | None:
    """``(earlier, new)`` of keys or values that capture/cache.py joined."""
    if t.target is not aten.cat.default or len(t.args[0]) != 2:
        return None
    first, new = t.args[0]
    if first.target is not aten.permute.default or not is_from_cache(first.args[0]):
        return None
    return first.args[0], new


def may_be_causal(q: Any, k: Any, v: Any, mask: Any, is_causal: bool) -> bool:
    """True where a kernel is for the device, every query stands for one key, and the mask compares positions."""
    values = [n.meta["val"] for n in (q, k, v)]
    if any(t.dim() != 4 or t.device.type not in devices() for t in values):
        return False
    if str(values[0].shape[2]) != str(values[1].shape[2]):
        return False
    if isinstance(values[0].shape[3], torch.SymInt) or isinstance(values[0].shape[1], torch.SymInt):
        return False
    if mask is None:
        return is_causal
    shape = mask.meta["val"].shape
    return (
        mask.meta["val"].dtype == torch.bool
        and len(shape) == 4
        and all(str(size) == str(values[0].shape[2]) for size in shape[2:])
        and compares(mask)
    )


def compares(mask: fx.Node) -> bool:
    """True if the mask depends on a comparison of positions, as every causal mask does."""
    seen: set[fx.Node] = set()
    stack = [mask]
    while stack:
        node = stack.pop()
        if node.target in COMPARISONS:
            return True
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return False


def before_repeat(t: Any, q: Any) -> Any:
    """Keys or values before ``unsqueeze(2)``, ``expand``, ``reshape`` gave each query head a copy."""
    chain = [t]
    for target in (aten.reshape.default, aten.expand.default, aten.unsqueeze.default):
        node = chain[-1]
        if not isinstance(node, fx.Node) or node.target is not target:
            return t
        chain.append(node.args[0])
    repeat, expand, unsqueeze, base = chain
    if unsqueeze.args[1] != 2 or base.meta["val"].dim() != 4:
        return t
    heads, times = (int(expand.meta["val"].shape[i]) for i in (1, 2))
    same = heads * times == int(repeat.meta["val"].shape[1]) == int(q.meta["val"].shape[1])
    return base if same else t
