"""lower: make the graph run. Each distinct body goes through AOTAutograd and Inductor once.

# Note [Where the gradient rule lives]
No bitsandbytes op has an autograd rule, and a graph that feeds one a differentiable input loses the
gradient there with only a warning. So the gradient rule lives in ordinary ops: ``dequantize_4bit`` reads
frozen storage only (its inputs never require grad), and the matmul is a plain ``aten.linear`` whose
derivative PyTorch knows. The alternative, one opaque op with ``register_autograd``, would hide the matmul
from the compiler: siblings could not share work, the LoRA products could not fuse with it, and the saved
tensors of the op would be invisible to the partitioner that decides what to recompute.

The price is that autograd wants the dequantized weight again for ``grad @ W``. The partitioner would save
it (16 or 32 bits per weight from forward to backward), so ``Partition`` marks every value that is
computed from storage alone as MUST_RECOMPUTE in the joint graph. See Note [What is
recomputed] in lowering/partition.py.

# Note [Why not through Dynamo]
``torch.compile(fn)`` is Dynamo (trace Python, make guards) in front of AOTAutograd and Inductor. Our graph
is traced already. Dynamo would trace it again, guard 60 tensors for each of 30 layers at every step, and
specialize sizes 0 and 1: a batch of one would be compiled again. Handing the captured symbolic shapes to
the same backend compiles each body once for every batch and sequence.
"""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from .lowering.compiled_body import CompiledBody
from .lowering.free_sizes import FreeSize, hidden_symbols, symbols

BACKENDS = ("inductor", "aot_eager", "eager")

# Note [The first of many blocks]
# The first block's input needs no gradient: nothing below it trains. That makes its backward another program,
# which takes as long to compile as that of all other blocks together, for the sake of the input gradient of
# a few products in one block. So a body that is called often is compiled once, and its first block computes a
# gradient that nobody reads. Blocks below the first adapter compute no gradient at all.

OFTEN = 2


def mark_usual(outer: fx.Graph, root: nn.Module) -> None:
    """Note in each body that is called often which of its inputs need grad in any call."""
    flows: set[fx.Node] = set()
    for node in outer.nodes:
        trained = node.op == "placeholder" and node.meta.get("trainable")
        val = node.meta.get("val")
        number = isinstance(val, torch.Tensor) and not val.is_floating_point()
        if trained or (not number and any(n in flows for n in node.all_input_nodes)):
            flows.add(node)
    for name, body in root.named_children():
        assert isinstance(body, CompiledBody)
        calls = list(outer.find_nodes(op="call_module", target=name))
        columns = zip(*(call.args[: len(body.inputs)] for call in calls), strict=True)
        body.flowing = tuple(any(arg in flows for arg in column) for column in columns)
        body.usual = body.flowing if len(calls) >= OFTEN else ()


def lower(gm: fx.GraphModule, *, backend: str = "inductor") -> fx.GraphModule:
    """The program: the outer graph with each body compiled. ``gm`` itself stays as it is.

    Args:
        gm: the pipeline's result. Without bodies it becomes one body.
        backend: ``inductor``, ``aot_eager`` (same graphs, PyTorch's kernels) or ``eager`` (plain autograd,
            which saves dequantized weights until backward: for debugging).
    """
    if backend == "eager":
        return gm
    if not any(True for _ in gm.graph.find_nodes(op="call_module")):
        outer = fx.Graph()
        inputs = []
        for node in gm.graph.find_nodes(op="placeholder"):
            inputs.append(outer.node_copy(node))
        call = outer.call_module("model", (*inputs, 0))
        outer.output(call)
        root = nn.Module()
        root.add_module("model", CompiledBody(gm, backend))
        mark_usual(outer, root)
        return fx.GraphModule(root, outer, type(gm).__name__)
    outer = fx.Graph()
    outer.output(outer.graph_copy(gm.graph, {}))
    inputs = list(outer.find_nodes(op="placeholder"))
    known = symbols(inputs)
    root = nn.Module()
    for name, body in gm.named_children():
        assert isinstance(body, fx.GraphModule)
        hidden = hidden_symbols(list(body.graph.find_nodes(op="placeholder")))
        foreign = [size for size in known if size.term in hidden]
        compiled = CompiledBody(body, backend, [s._replace(place=None) for s in foreign])
        root.add_module(name, compiled)
        calls = list(outer.find_nodes(op="call_module", target=name))
        compiled.calls = len(calls)
        compiled.block = bool(calls[0].meta["module"])
        for number, node in enumerate(calls):
            with outer.inserting_before(node):
                sizes = [read(outer, inputs, size) for size in foreign]
            node.args = (*node.args, *sizes, number)
    mark_usual(outer, root)
    return fx.GraphModule(root, outer, type(gm).__name__)


def read(graph: fx.Graph, inputs: list[fx.Node], size: FreeSize) -> fx.Node:
    """Nodes that read a free size from the inputs of the whole graph."""
    assert size.place is not None
    i, dim = size.place
    node = graph.call_function(torch.ops.aten.sym_size.int, (inputs[i], dim))
    return node if size.times == 1 else graph.call_function(operator.floordiv, (node, size.times))
