"""attention: where a mask may be causal, skip what it hides."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..runtime.attention_kernels import devices, take_sequences
from .graph.nodes import Emitter, arguments, aten, call, is_from_cache, ops


class Joined(NamedTuple):
    """Keys, or values, of a cache and new ones.

    Attributes:
        earlier: ``[tokens, batch, heads, size]``.
        new: ``[batch, heads, tokens, size]``.
        start: of the ring that the earlier ones are; None where they lie in the model's order.
    """

    earlier: fx.Node
    new: fx.Node
    start: fx.Node | None


COMPARISONS = frozenset(
    {
        aten.le.Tensor,
        aten.lt.Tensor,
        aten.ge.Tensor,
        aten.gt.Tensor,
        aten.tril.default,
        aten.triu.default,
        aten.bucketize.Tensor,
    }
)
"""What masks are made by that hide much: comparisons of positions, and which of several pictures a patch is of."""


def attention(gm: fx.GraphModule, *, config: Any) -> PassResult:
    """Attention over an explicit mask becomes ``qlora_fx.attention``, told at run time what the mask is.

    A captured model builds a mask of ``[sequence, sequence]`` and its kernel reads all of it. What the batch
    made of it is seen by ``mask_kind`` once per call: exactly causal, or anything else (padding, a window, several
    pictures), of which the tiles that hide everything are skipped; on a GPU ``mask_sequences`` says where sequences start, too. Keys that a model repeats for its query heads are taken as
    they were before. Where no kernel of ours is for the device, PyTorch's are kept. On a GPU the look at the mask
    waits for the device, once per call of the model.

    Over a cache it becomes ``qlora_fx.cached_attention``, for which earlier and new keys are not joined. Where the cache is
    a ring, keys and values are read as they lie, and the mask is brought into their order once (runtime/ring.py).

    Before::

        %attn: f32[B, 4, S, 16] = aten.scaled_dot_product_attention(%q, %k, %v, %mask, scale=0.25)

    After::

        %mask_kind: i64[] = qlora_fx.mask_kind(%mask)
        %attn_causal: (f32[B, 4, S, 16], f32[B, 4, S]) = qlora_fx.attention(%q, %k, %v, %mask, %mask_kind, 0.25)
        %attn_result: f32[B, 4, S, 16] = getitem(%attn_causal, 0)
    """
    graph = gm.graph
    kinds: dict[fx.Node, tuple[fx.Node, ...]] = {}
    masks: dict[fx.Node, fx.Node] = {}
    modified = False
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        modified |= over_a_cache(graph, node, masks) or over_itself(graph, node, kinds)
    if modified:
        graph.eliminate_dead_code()
    return PassResult(gm, modified)


def over_a_cache(graph: fx.Graph, node: fx.Node, masks: dict[fx.Node, fx.Node]) -> bool:
    """Attention over keys of a cache and new ones; ``masks`` are those of rings, by the model's."""
    q, k, v, mask, scale = operands(node)
    keys, values = joined(k), joined(v)
    if arguments(node)["dropout_p"] or not keys or not values or not mask_per_token(q, mask):
        return False
    if (keys.start is None) is not (values.start is None):
        return False
    if keys.start is not None:
        if mask not in masks:
            with graph.inserting_after(mask):
                ring = (mask, keys.start, keys.earlier)
                name = f"{mask.name}_rolled"
                masks[mask] = call(graph, ops.rolled.default, ring, name=name, like=mask)
        mask = masks[mask]
    emit = Emitter(graph, node)
    args = (q, keys.earlier, keys.new, values.earlier, values.new, mask, scale)
    with graph.inserting_before(node):
        result = emit(ops.cached_attention.default, *args, suffix="cached")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def operands(node: fx.Node) -> tuple[Any, Any, Any, Any, float]:
    """Query, keys and values before they were repeated, mask, scale."""
    args = arguments(node)
    q, scale = args["query"], args["scale"]
    if scale is None:
        scale = float(int(q.meta["val"].shape[-1]) ** -0.5)
    k, v = (before_repeat(args[name], q) for name in ("key", "value"))
    return q, k, v, args["attn_mask"], scale


def over_itself(graph: fx.Graph, node: fx.Node, kinds: dict[fx.Node, tuple[fx.Node, ...]]) -> bool:
    """Attention of each token over all; ``kinds`` are what masks turn out to be, and where their sequences start."""
    args = arguments(node)
    q, k, v, mask, scale = operands(node)
    if args["dropout_p"]:
        return False
    if not may_be_causal(q, k, v, mask, args["is_causal"]):
        return False
    if mask is not None and mask not in kinds:
        kinds[mask] = looked_at(graph, mask)
    kind, *starts = kinds.get(mask, (None,))
    emit = Emitter(graph, node)
    with graph.inserting_before(node):
        call_args = (q, k, v, mask, kind, scale, *starts)
        pair = emit(ops.attention.default, *call_args, suffix="causal")
        result = emit(operator.getitem, pair, 0, suffix="result")
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def looked_at(graph: fx.Graph, mask: fx.Node) -> tuple[fx.Node, ...]:
    """What a mask is and, on devices with a kernel that takes them, where its sequences start."""
    val, name = mask.meta["val"], mask.name
    with graph.inserting_after(mask):
        if val.device.type not in take_sequences() or val.shape[1] != 1:
            return (call(graph, ops.mask_kind.default, (mask,), name=f"{name}_kind", like=mask),)
        both = call(graph, ops.mask_sequences.default, (mask,), name=f"{name}_seen", like=mask)
    with graph.inserting_after(both):
        starts = call(graph, operator.getitem, (both, 1), name=f"{name}_cu_seqlens", like=mask)
        kind = call(graph, operator.getitem, (both, 0), name=f"{name}_kind", like=mask)
    return kind, starts


def mask_per_token(q: Any, mask: Any) -> bool:
    """True where a mask says which keys a token sees."""
    if mask is None:
        return False
    shape = mask.meta["val"].shape
    return q.meta["val"].dim() == 4 and len(shape) == 4 and not isinstance(shape[1], torch.SymInt)


def joined(t: Any) -> Joined | None:
    """The parts of keys or values that capture/cache_layers.py joined."""
    if t.target is not aten.cat.default or len(t.args[0]) != 2:
        return None
    first, new = t.args[0]
    if first.target is not aten.permute.default:
        return None
    earlier, start = first.args[0], None
    if earlier.target is ops.unrolled.default:
        earlier, start = earlier.args
    return Joined(earlier, new, start) if is_from_cache(earlier) else None


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
    """True if the mask depends on a comparison of positions, as every causal mask does, or keeps pictures apart."""
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
