"""loss_head: the cross-entropy of a frozen head, without its logits."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from .graph.nodes import CASTS, Emitter, arguments, aten, cast, ops, parameter_behind
from .graph.site import Site
from .schemes import storage_of

KEEPS_ROWS = CASTS | {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.flatten.using_ints,
}
MEAN, SUM = 1, 2


@dataclass
class Chain:
    """What lies between a head's linear and the cross-entropy of its logits."""

    head: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    slices: list[fx.Node] = field(default_factory=list)
    scale: float = 1.0
    softcap: float = 0.0


def loss_head(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Where nobody asked for logits, ``linear -> float -> cross_entropy`` becomes one chunked operator.

    See runtime/loss.py. The output that held the logits becomes None; they are computed when asked for
    (``return_logits=True``, or in eval mode), by a capture of its own. A scale and a softcap of the logits
    are taken along. A head that is adapted or read by anything else stays as it is.

    Before::

        %lm_head: bf16[B, S, 128] = aten.linear(%x, %lm_head_weight)
        %to: f32[B, S, 128] = aten.to.dtype(%lm_head, f32)
        %view: f32[B*S, 128] = aten.view(%to, [-1, 128])
        %loss: f32[] = aten.cross_entropy_loss(%view, %labels)

    After::

        %lm_head_rows: bf16[B*S, 64] = aten.reshape(%x, [-1, 64])
        %lm_head_loss: (f32[], f32[], bf16[B*S, 64]) = qlora_fx.linear_cross_entropy(
            %lm_head_rows, [%lm_head_weight], None, %labels, -100, 1.0, 0.0, [128, 64], 64, , True)
        %lm_head_total: f32[] = getitem(%lm_head_loss, 0)
        %lm_head_count: f32[] = getitem(%lm_head_loss, 1)
        %lm_head_mean: f32[] = aten.div(%lm_head_total, %lm_head_count)
    """
    graph = gm.graph
    if config.return_logits:
        return PassResult(gm, False)
    modified = False
    for node in graph.find_nodes(op="call_function", target=aten.cross_entropy_loss.default):
        chain = chain_to_head(node, config)
        if chain is not None:
            rewrite(graph, node, chain, config)
            modified = True
    if modified:
        graph.eliminate_dead_code()
    return PassResult(gm, modified)


def chain_to_head(loss: fx.Node, config: Config) -> Chain | None:
    """The way from a loss back to a frozen head; None if another reader needs the logits, or it is another loss."""
    args = arguments(loss)
    logits, labels = args["self"], args["target"]
    if args["weight"] is not None or args["label_smoothing"]:
        return None
    if args["reduction"] not in (MEAN, SUM):
        return None
    if logits.meta["val"].dim() != 2 or labels.meta["val"].dim() != 1:
        return None
    nodes = []
    node = logits
    while isinstance(node, fx.Node) and node.target is not aten.linear.default:
        nodes.append(node)
        node = node.args[0] if node.args else None
    if not isinstance(node, fx.Node) or "site" not in node.meta:
        return None
    site: Site = node.meta["site"]
    if site.adapt or site.weight not in config.output_heads:
        return None
    if any(trains(a) for a in node.args[1:]):
        return None  # the operator has no gradient for them
    chain = Chain(node, nodes[::-1])
    known = {node, loss, *nodes}
    for at in (node, *nodes):
        if any(user not in known and user.op != "output" for user in at.users):
            return None
    return chain if understand(chain) else None


def trains(weight: Any) -> bool:
    """True for a tensor of the head that trains itself (thaw.py)."""
    behind = parameter_behind(weight)
    return behind is not None and bool(behind.meta.get("trainable"))


def understand(chain: Chain) -> bool:
    """Read slices, scale and softcap off the chain; False for anything else."""
    is_flat = False
    cap = 0.0  # what the logits were divided by before tanh
    past_tanh = False
    for node in chain.nodes:
        if node.target in KEEPS_ROWS:
            is_flat |= node.target not in CASTS and node.meta["val"].dim() == 2
        elif node.target is aten.slice.Tensor:
            if is_flat or node.args[1] in (-1, node.meta["val"].dim() - 1):
                return False
            chain.slices.append(node)
        elif node.target is aten.tanh.default:
            if past_tanh or not cap:
                return False
            chain.scale, past_tanh = chain.scale * cap, True
        elif node.target in (aten.mul.Tensor, aten.div.Tensor):
            by = node.args[1]
            if not isinstance(by, (int, float)) or not by:
                return False
            if past_tanh:
                if node.target is not aten.mul.Tensor or chain.softcap or by != cap:
                    return False
                chain.softcap = float(by)
            else:
                chain.scale *= by if node.target is aten.mul.Tensor else 1 / by
                cap = by if node.target is aten.div.Tensor else 0.0
        else:
            return False
    return past_tanh == bool(chain.softcap)


def rewrite(graph: fx.Graph, loss: fx.Node, chain: Chain, config: Config) -> None:
    head = chain.head
    site: Site = head.meta["site"]
    args = arguments(loss)
    x, weight, *bias = head.args
    then = Emitter(graph, head)
    with graph.inserting_before(loss):
        rows: Any = x
        for step in chain.slices:
            rows = then(aten.slice.Tensor, rows, *step.args[1:], suffix="positions")
        rows = then(aten.reshape.default, rows, [-1, site.in_features], suffix="rows")
        storage, blocksize, quant_type = storage_of(weight)
        triple = then(
            ops.linear_cross_entropy.default,
            *(rows, storage, bias[0] if bias else None, args["target"], args["ignore_index"]),
            *(chain.scale, chain.softcap, list(site.shape), blocksize, quant_type, True),
            suffix="loss",
        )
        triple.meta["site"] = site
        result = then(operator.getitem, triple, 0, suffix="total")
        if args["reduction"] == MEAN:
            count = then(operator.getitem, triple, 1, suffix="count")
            result = then(aten.div.Tensor, result, count, suffix="mean")
        result = cast(graph, result, loss.meta["val"].dtype, f"{head.name}_mean_cast")
    loss.replace_all_uses_with(result)
    old = {chain.head, *chain.nodes}
    output = next(iter(graph.find_nodes(op="output")))
    results: Any = output.args[0]
    output.args = (tuple(None if value in old else value for value in results),)
    graph.erase_node(loss)
    for node in (*chain.nodes[::-1], chain.head):
        graph.erase_node(node)
