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

import sympy
import torch
from torch import fx, nn

from .graph.nodes import aten
from .lowering.compiled_body import CompiledBody
from .lowering.free_sizes import number, symbols

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
    bodies = dict(gm.named_children())
    outer = fx.Graph()
    if bodies:
        outer.output(outer.graph_copy(gm.graph, {}))
    else:
        bodies = {"model": gm}
        inputs = [outer.node_copy(node) for node in gm.graph.find_nodes(op="placeholder")]
        outer.output(outer.call_module("model", tuple(inputs)))
    sizes = Sizes(outer)
    root = nn.Module()
    for name, body in bodies.items():
        assert isinstance(body, fx.GraphModule)
        compiled = CompiledBody(body, backend)
        root.add_module(name, compiled)
        inputs = list(body.graph.find_nodes(op="placeholder"))
        kept = [i for i, node in enumerate(inputs) if node in compiled.inputs]
        calls = list(outer.find_nodes(op="call_module", target=name))
        compiled.calls = len(calls)
        compiled.block = bool(calls[0].meta.get("module"))
        passed = [sizes(size.formula) for size in compiled.free if size.place is None]
        for number_of_call, node in enumerate(calls):
            node.args = (*(node.args[i] for i in kept), *passed, number_of_call)
    mark_usual(outer, root)
    return fx.GraphModule(root, outer, type(gm).__name__)


class Sizes:
    """Nodes that work sizes out from the inputs of the whole graph, before anything else."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.inputs = list(graph.find_nodes(op="placeholder"))
        self.first = next(n for n in graph.nodes if n.op != "placeholder")
        self.shown = {size.term: size for size in symbols(self.inputs)}
        self.known: dict[sympy.Expr, fx.Node] = {}

    def __call__(self, formula: sympy.Expr) -> fx.Node:
        if formula not in self.known:
            values = {} if formula.is_symbol else {s: self(s) for s in formula.free_symbols}
            with self.graph.inserting_before(self.first):
                self.known[formula] = (
                    self.read(formula) if formula.is_symbol else number(self.graph, formula, values)
                )
        return self.known[formula]

    def read(self, symbol: sympy.Symbol) -> fx.Node:
        place, times = self.shown[symbol].place, self.shown[symbol].times
        assert place is not None
        i, dim = place
        node = self.graph.call_function(aten.sym_size.int, (self.inputs[i], dim))
        return node if times == 1 else self.graph.call_function(operator.floordiv, (node, times))
