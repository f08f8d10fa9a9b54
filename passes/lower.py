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
recomputed] in partition.py.

# Note [Why not through Dynamo]
``torch.compile(fn)`` is Dynamo (trace Python, make guards) in front of AOTAutograd and Inductor. Our graph
is traced already. Dynamo would trace it again, guard 60 tensors for each of 30 layers at every step, and
specialize sizes 0 and 1: a batch of one would be compiled again. Handing the captured symbolic shapes to
the same backend compiles each body once for every batch and sequence.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.exc import InductorError

from ..runtime.attention import library
from .nodes import ops
from .partition import Partition

BACKENDS = ("inductor", "aot_eager", "eager")


class CompiledBody(nn.Module):
    """One body, compiled on first use for each combination of grad mode and inputs that need grad.

    Shapes never cause another compilation: sizes are symbols of the capture.

    Attributes:
        usual: which inputs need grad in most calls, where the body is called often; empty otherwise.

    Args:
        foreign: free sizes that no input of the body shows by itself (only ``[B * S, 8]``); the caller passes
            them behind the tensors.
    """

    def __init__(
        self, body: fx.GraphModule, backend: str, foreign: Sequence[torch.SymInt] = ()
    ) -> None:
        super().__init__()
        self.body = body
        self.backend = backend
        self.compiled: dict[Any, Callable[..., Any]] = {}
        self.partitions: dict[Any, Partition] = {}
        self.inputs = list(body.graph.find_nodes(op="placeholder"))
        output = next(iter(body.graph.find_nodes(op="output")))
        self.single = isinstance(output.args[0], fx.Node)
        self.sizes = [where for _, where in symbols(self.inputs)]
        self.foreign = list(foreign)
        self.usual: tuple[bool, ...] = ()
        self.told = False

    def forward(self, *values: Any) -> Any:
        args, foreign = values[: len(self.inputs)], values[len(self.inputs) :]
        needs_grad = tuple(a.requires_grad for a in args) if torch.is_grad_enabled() else ()
        if any(needs_grad) and self.covers(needs_grad):
            args = tuple(
                a.detach().requires_grad_() if usual and not a.requires_grad else a
                for a, usual in zip(args, self.usual, strict=True)
            )
            needs_grad = self.usual
        compiled = self.compiled.get(needs_grad)
        if compiled is None:
            compiled = self.compiled[needs_grad] = self.build(needs_grad)
        outputs = compiled(*args, *(args[i].shape[dim] for i, dim in self.sizes), *foreign)
        return outputs[0] if self.single else outputs

    def covers(self, needs_grad: tuple[bool, ...]) -> bool:
        """True if the usual program computes every gradient that is asked for. Note [The first of many blocks]."""
        return bool(self.usual) and all(
            usual or not need for usual, need in zip(self.usual, needs_grad, strict=True)
        )

    def build(self, needs_grad: tuple[bool, ...]) -> Callable[..., Any]:
        gm, args, partition = self.prepared(needs_grad)
        self.partitions[needs_grad] = partition
        if warm_up.thread is not None:
            warm_up.thread.join()
        with tracing(TracingContext(args[0].fake_mode)):
            if self.backend == "inductor":
                patches = {"custom_partitioner_fn": partition}
                try:
                    compiled: Any = compile_fx(gm, args, config_patches=patches)
                except InductorError as error:
                    self.tell(error)
                    gm, *_ = self.prepared(needs_grad)
                else:
                    return compiled  # type: ignore[no-any-return]
            return aot_eager(gm, args, partition)

    def prepared(self, needs_grad: tuple[bool, ...]) -> tuple[fx.GraphModule, list[Any], Partition]:
        """A copy of the body, fake arguments for it, and its partitioner."""
        sizes = [size for size, _ in symbols(self.inputs)] + self.foreign
        gm = tuple_output(self.body, sizes)
        if not needs_grad:
            skip_gradients(gm.graph)
        args: list[Any] = []
        with next(iter(self.inputs)).meta["val"].fake_mode:
            for i, node in enumerate(self.inputs):
                val = node.meta["val"].detach()
                args.append(val.requires_grad_() if needs_grad and needs_grad[i] else val)
        held = frozenset(i for i, n in enumerate(self.inputs) if "stored" in n.meta)
        return gm, args + sizes, Partition(held)

    def partitioned(self, needs_grad: tuple[bool, ...]) -> Partition:
        """How a program was split, which is found out again where the program came from a cache."""
        partition = self.partitions[needs_grad]
        if not partition.inputs and any(needs_grad):
            gm, args, partition = self.prepared(needs_grad)
            with tracing(TracingContext(args[0].fake_mode)):
                aot_eager(gm, args, partition)
            self.partitions[needs_grad] = partition
        return partition

    def tell(self, error: Exception) -> None:
        """Warn once that Inductor refused."""
        if not self.told:
            self.told = True
            warnings.warn(
                f"Inductor cannot compile {type(self.body).__name__} ({str(error).partition(chr(10))[0]}); it "
                "runs on PyTorch's own kernels, as with backend='aot_eager'",
                stacklevel=3,
            )


def aot_eager(gm: fx.GraphModule, args: list[Any], partition: Partition) -> Callable[..., Any]:
    """The same joint graph, partition and recomputation, run by PyTorch's own kernels."""
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_module_simplified

    def run(gm: fx.GraphModule, example_inputs: Any) -> Any:
        # Some kernels give other strides than their fake ones say (constant_pad_nd of a permuted tensor keeps
        # them), so that a view that was possible while tracing is not. The graph is functional: copying is right.
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
            node.target = torch.ops.aten.reshape.default
        gm.recompile()
        return make_boxed_func(gm.forward)

    compiled: Callable[..., Any] = aot_module_simplified(
        gm, args, fw_compiler=run, bw_compiler=run, partition_fn=partition
    )
    return compiled


def symbols(inputs: Sequence[fx.Node]) -> list[tuple[torch.SymInt, tuple[int, int]]]:
    """Each free size of the inputs, with the input and dimension it can be read from."""
    found: dict[Any, tuple[torch.SymInt, tuple[int, int]]] = {}
    for i, node in enumerate(inputs):
        for dim, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(size.node.expr, (size, (i, dim)))
    return list(found.values())


def hidden_symbols(body: fx.GraphModule) -> set[Any]:
    """Free sizes of the body's inputs that none of them shows by itself."""
    inputs = list(body.graph.find_nodes(op="placeholder"))
    shown = {size.node.expr for size, _ in symbols(inputs)}
    used = {
        symbol
        for node in inputs
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    return used - shown


def tuple_output(body: fx.GraphModule, sizes: Sequence[torch.SymInt]) -> fx.GraphModule:
    """A copy that returns a tuple and takes the free sizes behind its tensors; the backend changes the copy.

    The graph itself reads sizes from its tensors. As inputs of their own they can be saved for backward,
    whose tensors may have products of them only (``[B * S, 8]``), from which they cannot be told.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = list(body.graph.find_nodes(op="placeholder"))
    for node in inputs:
        mapping[node] = graph.node_copy(node)
    for i, size in enumerate(sizes):
        graph.placeholder(f"size_{i}").meta["val"] = size
    value = graph.graph_copy(body.graph, mapping)
    graph.output(value if isinstance(value, tuple) else (value,))
    return fx.GraphModule(nn.Module(), graph)


class WarmUp:
    """Lets Inductor find out what this CPU can do, which takes 10 s of test compilations, while a model is captured.

    The attention kernel, which is the same for every model, is compiled meanwhile too.

    The work is in compiler processes; Python's lock is free meanwhile.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, daemon=True)
            self.thread.start()

    def run(self) -> None:
        pick_vec_isa()
        library()


warm_up = WarmUp()


# Note [The first of many blocks]
# The first block's input needs no gradient: nothing below it trains. That makes its backward another program,
# which takes as long to compile as that of all other blocks together, for the sake of the input gradient of
# a few products in one block. So a body that is called often is compiled once, and its first block computes a
# gradient that nobody reads. Blocks below the first adapter compute no gradient at all.

OFTEN = 4


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
        calls = list(outer.find_nodes(op="call_module", target=name))
        if len(calls) >= OFTEN and isinstance(body, CompiledBody):
            columns = zip(*(call.args[: len(body.inputs)] for call in calls), strict=True)
            body.usual = tuple(any(arg in flows for arg in column) for column in columns)


def skip_gradients(graph: fx.Graph) -> None:
    """Let no loss form its gradient in the forward: nobody will ask for it."""
    for node in graph.find_nodes(op="call_function", target=ops.linear_cross_entropy.default):
        node.args = (*node.args[:-1], False)


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
        call = outer.call_module("model", tuple(inputs))
        outer.output(call)
        root = nn.Module()
        root.add_module("model", CompiledBody(gm, backend))
        return fx.GraphModule(root, outer, type(gm).__name__)
    outer = fx.Graph()
    outer.output(outer.graph_copy(gm.graph, {}))
    known = symbols(list(outer.find_nodes(op="placeholder")))
    inputs = list(outer.find_nodes(op="placeholder"))
    root = nn.Module()
    for name, body in gm.named_children():
        assert isinstance(body, fx.GraphModule)
        hidden = hidden_symbols(body)
        foreign = [(size, where) for size, where in known if size.node.expr in hidden]
        root.add_module(name, CompiledBody(body, backend, [size for size, _ in foreign]))
        for node in outer.find_nodes(op="call_module", target=name):
            with outer.inserting_before(node):
                sizes = [
                    outer.call_function(torch.ops.aten.sym_size.int, (inputs[i], dim))
                    for _, (i, dim) in foreign
                ]
            node.args = (*node.args, *sizes)
    mark_usual(outer, root)
    return fx.GraphModule(root, outer, type(gm).__name__)
