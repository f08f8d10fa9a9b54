"""Which bytes are live while a partitioned graph runs, node by node, as formulas in its sizes.

What Inductor makes of a graph decides what has memory at all: a pointwise value exists only where something that is
not pointwise reads it, or where it is returned; everything else is fused into its reader. A buffer lives from the
node that makes it to the last one that reads it, through views and fused values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ..graph.nodes import CASTS, VIEWS_AND_CASTS, aten
from .operators import ZERO, elements, operator_of


@dataclass(frozen=True)
class Event:
    """One change of what is live.

    Attributes:
        node: what runs.
        bytes: added (or, negative, freed) by it.
        moment: added only while it runs.
    """

    node: str
    bytes: sympy.Expr
    moment: sympy.Expr


def events(graph: fx.Graph, transient: Iterable[fx.Node]) -> list[Event]:
    """The changes of what is live while ``graph`` runs.

    Args:
        transient: placeholders that are live at the start because of this graph, and freed after their last reader
            (what the forward saved, and the gradients that come in). Other placeholders are parameters.
    """
    output: Any = next(iter(graph.find_nodes(op="output")))
    transient = set(transient)
    reads: dict[fx.Node, frozenset[fx.Node]] = {}  # buffers that a node's value is read from
    last: dict[fx.Node, fx.Node] = {}
    made: dict[fx.Node, sympy.Expr] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            reads[node] = frozenset({node}) if node in transient else frozenset()
            if node in transient:
                made[node] = size_of(node)
            continue
        through = frozenset(b for n in node.all_input_nodes for b in reads.get(n, ()))
        if node.op == "output":
            continue
        if has_memory(node):
            for buffer in through:
                last[buffer] = node
            made[node] = size_of(node)
            reads[node] = frozenset({node})
        else:
            reads[node] = through
    kept = {b for n in output.all_input_nodes for b in reads.get(n, ())}
    freed: dict[fx.Node, list[fx.Node]] = {}
    for buffer, reader in last.items():
        if buffer not in kept:
            freed.setdefault(reader, []).append(buffer)
    found = [Event(n.name, made[n], ZERO) for n in made if n.op == "placeholder"]
    for node in graph.nodes:
        if node in made and node.op != "placeholder":
            found.append(Event(node.name, made[node], operator_of(node).workspace(node)))
            for buffer in freed.get(node, ()):
                found.append(Event(buffer.name, -made[buffer], ZERO))
            if node not in last and node not in kept:
                found.append(Event(node.name, -made[node], ZERO))
    return found


def has_memory(node: fx.Node) -> bool:
    """Whether Inductor gives the value a buffer of its own."""
    if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
        return False
    if is_view(node):
        return False
    if is_extern(node) or is_reduction(node):
        return True
    return any(is_extern(user) or user.op == "output" for user in readers(node))


def readers(node: fx.Node) -> Iterable[fx.Node]:
    """Users, through views."""
    for user in node.users:
        if is_view(user):
            yield from readers(user)
        else:
            yield user


def is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in VIEWS_AND_CASTS - CASTS - COPIES


COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten._to_copy.default})


def is_extern(node: fx.Node) -> bool:
    """A call that Inductor does not make code for: products, and operators of bitsandbytes and ours."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target.namespace in ("qlora_fx", "bitsandbytes") or node.target in EXTERN


EXTERN = frozenset(
    {
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.convolution.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
        aten.sort.default,
        aten.topk.default,
    }
)


def is_reduction(node: fx.Node) -> bool:
    return node.op == "call_function" and torch.Tag.reduction in getattr(node.target, "tags", ())


def size_of(node: fx.Node) -> sympy.Expr:
    """Bytes of a value, of all tensors of a tuple."""
    val = node.meta["val"]
    tensors = val if isinstance(val, (tuple, list)) else (val,)
    return sum(
        (elements(t) * t.element_size() for t in tensors if isinstance(t, torch.Tensor)),
        ZERO,
    )


def peak(changes: Iterable[Event], sizes: Mapping[sympy.Expr, int]) -> int:
    """The most that is live at once, in bytes, at given sizes."""
    live = most = 0
    for event in changes:
        live += value(event.bytes, sizes)
        most = max(most, live + value(event.moment, sizes))
    return most


def value(size: Any, sizes: Mapping[sympy.Expr, int]) -> int:
    """A formula at given sizes; sizes that the data decide (rows of an expert) count as 0, or as 1 where they divide."""
    known = {symbol: sympy.Integer(number) for symbol, number in sizes.items()}
    found = sympy.sympify(size).xreplace(known)
    try:
        return int(found.xreplace(dict.fromkeys(found.free_symbols, ZERO)))
    except ZeroDivisionError:
        return int(found.xreplace(dict.fromkeys(found.free_symbols, sympy.S.One)))
