"""One body of the program, compiled when it first runs, in as many ways as it is called."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch._functorch import config as functorch
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx
from torch._inductor.exc import InductorError
from torch._inductor.virtualized import V

from ...runtime.torch_versions import (
    averages_at_the_edge,
    below_autograd,
    no_tiled_outer_loops,
    writes_in_order,
)
from ..graph.nodes import writes
from .brief_trace import WritesError, brief_trace
from .example import Example
from .example_graph import skip_gradients, tuple_output
from .free_sizes import free_sizes, numbers_told
from .index_arithmetic import polynomials_expanded
from .on_gpu import OneWeightAtATime, OnGpu
from .one_library import one_library
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


class Variant(NamedTuple):
    """One compiled form of a body.

    Attributes:
        run: takes the tensors and then the free sizes.
        holds: whether it is right for given sizes; None where it is for all. Note [Guards of the compiler].
    """

    run: Callable[..., Any]
    holds: Callable[[tuple[int, ...]], bool] | None


class CompiledBody(nn.Module):
    """One body, compiled on first use for each combination of grad mode and inputs that need grad.

    Other sizes cause another compilation only where the compiler itself relied on them.

    Attributes:
        inputs: those of which more is read than sizes.
        free: the free sizes. Those that no input shows by itself (only ``[B * S, 8]``) the caller passes behind the
            inputs, and behind those the number of the call.
        calls: how often the body is called in one run of the program.
        block: whether it is a block of the model, which may keep only its inputs.
        recomputed: calls with a smaller number keep only their inputs for backward; set before each run, from
            the memory budget.
        flowing: which inputs need grad in any call.
        usual: the same where the body is called often; empty otherwise.
    """

    def __init__(self, body: fx.GraphModule, backend: str) -> None:
        super().__init__()
        self.body = body
        self.backend = backend
        self.compiled: dict[Key, list[Variant]] = {}
        self.partitions: dict[Key, Partition] = {}
        told, depend = numbers_told(body.graph)
        self.inputs = [n for n in body.graph.find_nodes(op="placeholder") if n not in depend]
        output = next(iter(body.graph.find_nodes(op="output")))
        self.single = isinstance(output.args[0], fx.Node)
        self.free = free_sizes(self.inputs, told)
        self.places = [(*size.place, size.times) for size in self.free if size.place is not None]
        self.calls = 1
        self.block = False
        self.recomputed = 0
        self.flowing: tuple[bool, ...] = ()
        self.usual: tuple[bool, ...] = ()
        self.warned = False

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
        sizes = (*(args[i].shape[dim] // times for i, dim, times in self.places), *foreign)
        run = self.variant(key, sizes).run
        # Without gradients autograd's part of each operator's dispatch is for nothing.
        with contextlib.nullcontext() if any(needs_grad) else below_autograd():
            outputs = run(*args, *sizes)
        return outputs[0] if self.single else outputs

    @property
    def compilations(self) -> int:
        """How often it was compiled."""
        return sum(len(variants) for variants in self.compiled.values())

    def variant(self, key: Key, sizes: tuple[int, ...]) -> Variant:
        """The compiled form for a call, compiled now if there is none. Note [Guards of the compiler]."""
        variants = self.compiled.setdefault(key, [])
        for variant in variants:
            if variant.holds is None or variant.holds(sizes):
                return variant
        variants.append(self.build(key, sizes))
        return variants[-1]

    def covers(self, needs_grad: tuple[bool, ...]) -> bool:
        """True if the usual program computes every gradient that is asked for. Note [The first of many blocks]."""
        return bool(self.usual) and all(
            usual or not need for usual, need in zip(self.usual, needs_grad, strict=True)
        )

    def build(self, key: Key, sizes: tuple[int, ...]) -> Variant:
        warm_up.wait()
        if self.backend == "inductor":
            try:
                # The backward too is compiled now: a refusal of it is ours to handle, not the user's.
                with (
                    functorch.patch(force_non_lazy_backward_lowering=True),
                    V.set_choices_handler(OneWeightAtATime()),
                    no_tiled_outer_loops(),
                    writes_in_order(),
                    averages_at_the_edge(),
                    one_library(),
                    polynomials_expanded(),
                ):
                    return traced(inductor, lambda: self.example(key, sizes))
            except InductorError as error:
                self.warn_once(error)
        return traced(aot_eager, lambda: self.example(key, sizes))

    def example(self, key: Key, sizes: Sequence[int] = ()) -> Example:
        """What to compile: a copy of the body and fake arguments of these sizes; default: those of the capture.

        How it is split is found out while it is compiled, and kept.
        """
        gm = tuple_output(self.body, self.free)
        if not key.needs_grad:
            skip_gradients(gm.graph)
        stored = frozenset(i for i, n in enumerate(self.inputs) if "stored" in n.meta)
        differentiated = frozenset(i for i, needs in enumerate(key.needs_grad) if needs)
        partition = Partition(stored, differentiated - stored, recompute=key.recompute)
        self.partitions[key] = partition
        vals = [n.meta["val"] for n in self.inputs]
        return Example(gm, vals, key.needs_grad, self.free, sizes, partition)

    def partitioned(self, key: Key) -> Partition:
        """How a program is split: found out, where it was not compiled yet or came from a cache."""
        partition = self.partitions.get(key)
        if partition is None or (not partition.inputs and any(key.needs_grad)):
            other = Key(key.needs_grad, not key.recompute)
            beside = self.block and other not in self.partitions  # what takes long is tracing

            def example() -> Example:
                example = self.example(key)
                if beside:
                    example.partition.other = example.partition.beside(other.recompute)
                    self.partitions[other] = example.partition.other
                return example

            with torch.inference_mode(False), torch.enable_grad():
                traced(aot_eager, example)
            partition = self.partitions[key]
            partition.other = None
        return partition

    def warn_once(self, error: Exception) -> None:
        """Say that Inductor refused."""
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"Inductor cannot compile {type(self.body).__name__} ({str(error).partition(chr(10))[0]}); it "
                "runs on PyTorch's own kernels, as with backend='aot_eager'",
                stacklevel=3,
            )


def traced(compiler: Callable[[Example], Any], example: Callable[[], Example]) -> Variant:
    """What a compiler makes of a body and its gradient. It changes an example, so that each try has its own."""

    def compiled(functional: bool) -> Variant:
        current = example()
        functional = functional and not any(map(writes, current.gm.graph.nodes))
        with tracing(TracingContext(current.mode)), brief_trace(functional):
            return Variant(compiler(current), current.guards())

    try:
        return compiled(functional=True)
    except WritesError:
        return compiled(functional=False)


def inductor(example: Example) -> Any:
    patches = {
        "custom_partitioner_fn": example.partition,
        "post_grad_custom_pre_pass": OnGpu(),
    }
    return compile_fx(example.gm, example.args, config_patches=patches)


def aot_eager(example: Example) -> Callable[..., Any]:
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
        example.gm,
        example.args,
        fw_compiler=run,
        bw_compiler=run,
        partition_fn=example.partition,
    )
    return compiled
