"""What is changed in a copy of a body before a compiler traces it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn

from .free_sizes import FreeSize, formula_of, number, numbers_told, written
from .operators import operator_of


def tuple_output(body: fx.GraphModule, free: Sequence[FreeSize] = ()) -> fx.GraphModule:
    """A copy that returns a tuple and takes the free sizes behind its tensors; the backend changes the copy.

    The graph itself reads sizes from its tensors. As inputs of their own they can be saved for backward,
    whose tensors may have products of them only (``[B * S, 8]``), from which they cannot be told. Inputs of which it
    reads nothing else are left out.
    """
    graph = fx.Graph()
    told, depend = numbers_told(body.graph)
    mapping: dict[fx.Node, fx.Node] = {}
    for node in body.graph.find_nodes(op="placeholder"):
        if node not in depend:
            mapping[node] = graph.node_copy(node)
    sizes = {sympy.Dummy(): graph.placeholder(f"size_{i}") for i in range(len(free))}
    for node in told:
        mapping[node] = number(graph, written(formula_of(node.meta["val"]), free, [*sizes]), sizes)
    for node in depend:
        mapping.setdefault(node, node)  # nobody reads it
    value = graph.graph_copy(body.graph, mapping)
    graph.output(value if isinstance(value, tuple) else (value,))
    copy_what_stands_alone(graph)
    keep_ranges(graph)
    return fx.GraphModule(nn.Module(), graph)


def keep_ranges(graph: fx.Graph) -> None:
    """Numbers that the data decide are traced anew: say again in which range the capture found that they are.

    A picture's height that is read from a tensor (SigLIP 2) is asked whether it is more than none.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.item.default):
        val = node.meta.get("val")
        if not isinstance(val, torch.SymInt):
            continue
        least = val.node.shape_env.bound_sympy(val.node.expr).lower
        if isinstance(least, sympy.Integer):
            with graph.inserting_after(node):
                enough = graph.call_function(operator.ge, (node, int(least)))
            with graph.inserting_after(enough):
                graph.call_function(torch._check, (enough,))


def copy_what_stands_alone(graph: fx.Graph) -> None:
    """Of a tensor and empty ones, ``cat`` is a contiguous copy; Inductor's keeps the strides, and a view behind it fails.

    Rotary embeddings of a whole head are written so: what passes by is empty.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default):
        read: Any = node.args[0]
        shapes = [n.meta["val"].shape for n in read]
        filled = [
            n
            for n, shape in zip(read, shapes, strict=True)
            if all(isinstance(size, torch.SymInt) or size for size in shape)
        ]
        if len(filled) == 1 < len(read):
            with graph.inserting_before(node):
                copy = graph.call_function(
                    torch.ops.aten.clone.default,
                    (filled[0],),
                    {"memory_format": torch.contiguous_format},
                )
            copy.meta.update(node.meta)
            node.replace_all_uses_with(copy)
            graph.erase_node(node)


def skip_gradients(graph: fx.Graph) -> None:
    """Let no loss form its gradient in the forward, and kernels multiply few rows: nobody will ask for gradients."""
    for node in graph.nodes:
        change = operator_of(node).without_grad
        if change is not None:
            change(node)
