"""One body of the program, compiled when it first runs, in as many ways as it is called."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._functorch import config as functorch
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError

from ..graph.nodes import ops
from .partition import Partition
from .warm_up import warm_up


class Key(NamedTuple):
    """In which way a body is compiled.

    Attributes:
        needs_grad: by input; empty without autograd.
        recompute: True keeps only the inputs for backward.
    """

    needs_grad: tuple[bool, ...]
    recompute: bool = False


class CompiledBody(nn.Module):
    """One body, compiled on first use for each combination of grad mode and inputs that need grad.

    Shapes never cause another compilation: sizes are symbols of the capture.

    Args:
        foreign: free sizes that no input of the body shows by itself (only ``[B * S, 8]``); the caller passes
            them behind the tensors, and behind those the number of the call.

    Attributes:
        calls: how often the body is called in one run of the program.
        recomputed: calls with a smaller number keep only their inputs for backward; set before each run, from
            the memory budget.
        flowing: which inputs need grad in any call.
        usual: the same where the body is called often; empty otherwise.
    """

    def __init__(
        self, body: fx.GraphModule, backend: str, foreign: Sequence[torch.SymInt] = ()
    ) -> None:
        super().__init__()
        self.body = body
        self.backend = backend
        self.compiled: dict[Key, Callable[..., Any]] = {}
        self.partitions: dict[Key, Partition] = {}
        self.inputs = list(body.graph.find_nodes(op="placeholder"))
        output = next(iter(body.graph.find_nodes(op="output")))
        self.single = isinstance(output.args[0], fx.Node)
        self.sizes = [where for _, where in symbols(self.inputs)]
        self.foreign = list(foreign)
        self.calls = 1
        self.recomputed = 0
        self.flowing: tuple[bool, ...] = ()
        self.usual: tuple[bool, ...] = ()
        self.told = False

    def forward(self, *values: Any) -> Any:
        args, (*foreign, call) = values[: len(self.inputs)], values[len(self.inputs) :]
        needs_grad = tuple(a.requires_grad for a in args) if torch.is_grad_enabled() else ()
        if any(needs_grad) and self.covers(needs_grad):
            args = tuple(
                a.detach().requires_grad_() if usual and not a.requires_grad else a
                for a, usual in zip(args, self.usual, strict=True)
            )
            needs_grad = self.usual
        key = Key(needs_grad, any(needs_grad) and call < self.recomputed)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.compiled[key] = self.build(key)
        outputs = compiled(*args, *(args[i].shape[dim] for i, dim in self.sizes), *foreign)
        return outputs[0] if self.single else outputs

    def covers(self, needs_grad: tuple[bool, ...]) -> bool:
        """True if the usual program computes every gradient that is asked for. Note [The first of many blocks]."""
        return bool(self.usual) and all(
            usual or not need for usual, need in zip(self.usual, needs_grad, strict=True)
        )

    def build(self, key: Key) -> Callable[..., Any]:
        gm, args, partition = self.prepared(key)
        self.partitions[key] = partition
        if warm_up.thread is not None:
            warm_up.thread.join()
        with tracing(TracingContext(args[0].fake_mode)):
            if self.backend == "inductor":
                patches = {"custom_partitioner_fn": partition}
                try:
                    # The backward too is compiled now: a refusal of it is ours to handle, not the user's.
                    with functorch.patch(force_non_lazy_backward_lowering=True):
                        compiled: Any = compile_fx(gm, args, config_patches=patches)
                except InductorError as error:
                    self.tell(error)
                    gm, *_ = self.prepared(key)
                else:
                    return compiled  # type: ignore[no-any-return]
            return aot_eager(gm, args, partition)

    def prepared(self, key: Key) -> tuple[fx.GraphModule, list[Any], Partition]:
        """A copy of the body, fake arguments for it, and its partitioner."""
        sizes = [size for size, _ in symbols(self.inputs)] + self.foreign
        gm = tuple_output(self.body, sizes)
        if not key.needs_grad:
            skip_gradients(gm.graph)
        args: list[Any] = []
        with next(iter(self.inputs)).meta["val"].fake_mode:
            for i, node in enumerate(self.inputs):
                val = node.meta["val"].detach()
                needed = bool(key.needs_grad) and key.needs_grad[i]
                args.append(val.requires_grad_() if needed else val)
        held = frozenset(i for i, n in enumerate(self.inputs) if "stored" in n.meta)
        own = frozenset(i for i, needed in enumerate(key.needs_grad) if needed) - held
        return gm, args + sizes, Partition(held, own, recompute=key.recompute)

    def partitioned(self, key: Key) -> Partition:
        """How a program is split: found out, where it was not compiled yet or came from a cache."""
        partition = self.partitions.get(key)
        if partition is None or (not partition.inputs and any(key.needs_grad)):
            gm, args, partition = self.prepared(key)
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                tracing(TracingContext(args[0].fake_mode)),
            ):
                aot_eager(gm, args, partition)
            self.partitions[key] = partition
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


def skip_gradients(graph: fx.Graph) -> None:
    """Let no loss form its gradient in the forward: nobody will ask for it."""
    for node in graph.find_nodes(op="call_function", target=ops.linear_cross_entropy.default):
        node.args = (*node.args[:-1], False)
