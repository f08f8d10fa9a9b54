"""The captured signatures over one base: found by the call's arguments, captured when there is none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..capture.arguments import Call, Signature
from ..capture.cache import ARGUMENT, START, is_past
from ..capture.cache_layers import Buffers
from ..capture.skeleton import Capture
from ..errors import CaptureError, InputError, users_stacklevel
from ..passes.lower import lower
from ..passes.lowering.recorded import forget, recorded
from ..runtime.program import DoesNotFit, Program
from ..weights.base import Base
from .compile import compile_call
from .pipeline import Result
from .recompute import Budget


@dataclass
class CapturedGraph:
    """One captured graph and the programs that run it.

    Attributes:
        graph: the pipeline's result.
        program: the graph as the backend runs it; its bodies are compiled when they are first called.
        budget: what the program holds for backward.
        uncompiled: the graph run operator by operator.
    """

    graph: fx.GraphModule
    program: Program
    budget: Budget
    uncompiled: Program


class Programs:
    """Runs calls of one base; all captured graphs read the same store.

    Args:
        base: its store has all weights and adapters.
        backend: one of ``passes.lower.BACKENDS``.
        memory_budget: as ``request.check_memory_budget`` returns it.
        cuda_graphs: as ``request.check_cuda_graphs`` returns it.

    Attributes:
        adapter: tensors that are read in the place of the store's, by key: another adapter's.
        buffers: lends caches their buffers, where calls are recorded; None where they are not.
        captured: graphs by signature, in the order in which they were captured.
    """

    def __init__(
        self,
        base: Base,
        backend: str,
        memory_budget: int | float | None,
        cuda_graphs: bool = False,
    ) -> None:
        self.base = base
        self.backend = backend
        self.captured: dict[Signature, list[CapturedGraph]] = {}
        self.adapter: Mapping[str, torch.Tensor] = {}
        self._memory_budget = memory_budget
        self._cuda_graphs = cuda_graphs
        self.buffers = Buffers() if cuda_graphs else None

    def use(self, adapter: Mapping[str, torch.Tensor]) -> None:
        """Let every program read this adapter's tensors."""
        self.adapter = adapter
        for several in self.captured.values():
            for one in several:
                one.program.replace(adapter)
                one.uncompiled.replace(adapter)

    def __iter__(self) -> Iterator[Program]:
        return (program for program, _ in self.runs())

    def runs(self) -> Iterator[tuple[Program, fx.GraphModule]]:
        """Every program, and the graph that it runs."""
        return ((one.program, one.graph) for several in self.captured.values() for one in several)

    @property
    def graphs(self) -> dict[Signature, fx.GraphModule]:
        """The first graph of each signature."""
        return {signature: several[0].graph for signature, several in self.captured.items()}

    @property
    def memory_budget(self) -> int | float | None:
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, value: int | float | None) -> None:
        self._memory_budget = value
        for several in self.captured.values():
            for one in several:
                one.budget.change(value)
                self.record_anew(one.program)

    @property
    def cuda_graphs(self) -> bool:
        return self._cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        self._cuda_graphs = value
        self.buffers = Buffers() if value else None
        for program in self:
            self.record_anew(program)

    def take_no_rings(self, error: Exception) -> None:
        """Let every cache grow from now on: the model's code does not take one of fixed room. Note [A ring]."""
        self.buffers = None
        warnings.warn(
            f"cuda_graphs: tokens of {self.base.skeleton.name} are not recorded: {error}",
            stacklevel=users_stacklevel(),
        )

    def record_anew(self, program: Program) -> None:
        """Forget what is recorded; blocks are recorded if that was asked for, and if sizes come again: a cache grows, a ring not."""
        if program.graphed is not None:
            forget(program.graphed)
        names = [name for name, _ in program.inputs]
        program.graphed = None
        if self._cuda_graphs and (START in names or not any(map(is_past, names))):
            assert isinstance(program.run, fx.GraphModule)
            program.graphed = recorded(program.run, self.base.device, read_at_once(program))

    def run(self, call: Call, signature: Signature, *, compiled: bool = True) -> Any:
        """The model's output for a call.

        Args:
            compiled: False runs the graph operator by operator. Later calls are compiled as ever.

        Raises:
            InputError: tensors that do not fit each other.
            CaptureError: a new signature that cannot be captured.
        """
        misfits = []
        for one in self.captured.get(signature, ()):
            try:
                return (one.program if compiled else one.uncompiled)(call.values)
            except DoesNotFit as error:
                if error.name is not None and is_past(error.name):
                    raise not_fitting(error) from None
                misfits.append(error)
        if misfits:
            warnings.warn(
                f"capturing {self.base.skeleton.name} again, its code depends on the shape: {misfits[0]}",
                stacklevel=users_stacklevel(),
            )
        new = self.capture(call, signature)
        try:
            return (new.program if compiled else new.uncompiled)(call.values)
        except DoesNotFit as error:
            raise not_fitting(misfits[0] if misfits else error) from None

    def capture(self, call: Call, signature: Signature) -> CapturedGraph:
        """Capture a further signature over the same store."""
        base = self.base
        try:
            capture, result = compile_call(base.skeleton, base.decided_config, call, signature)
        except CaptureError as error:
            if signature in self.captured:
                raise InputError(
                    f"the tensors of this call do not fit each other: {error}"
                ) from error
            raise
        return self.add(signature, capture, result)

    def add(self, signature: Signature, capture: Capture, result: Result) -> CapturedGraph:
        """Take in a captured graph, whose constants go to the store."""
        store, gm = self.base.store, result.gm
        for node in gm.graph.nodes:
            constant = capture.constants.get(node.meta.get("stored", ""))
            if constant is not None:
                # Where the graph was traced with it: the model moves it itself.
                store.tensors[node.meta["stored"]] = constant.to(node.meta["val"].device)
        keys = [n.meta["stored"] for n in gm.graph.nodes if "stored" in n.meta]
        stored = [(key, self.adapter.get(key, store[key])) for key in keys]
        inputs = [(n.meta["input"], n.meta["val"]) for n in gm.graph.nodes if "input" in n.meta]
        lowered = lower(gm, backend=self.backend)
        program, uncompiled = (
            Program(run, stored, inputs, capture.guards, capture.out_spec)
            for run in (lowered, lower(gm, backend="eager"))
        )
        budget = Budget(lowered, self._memory_budget, self.base.device)
        program.prepare = budget.prepare
        self.record_anew(program)
        new = CapturedGraph(gm, program, budget, uncompiled)
        self.captured.setdefault(signature, []).append(new)
        return new


def read_at_once(program: Program) -> set[int]:
    """Positions of the results that a cache takes over before anything else happens: keys and values of new tokens."""
    if START not in (name for name, _ in program.inputs):
        return set()
    output = pytree.tree_unflatten(range(program.out_spec.num_leaves), program.out_spec)
    return set(pytree.tree_leaves(output[ARGUMENT]))


def not_fitting(error: DoesNotFit) -> InputError:
    """What a caller is told whose tensors do not fit each other, or a cache that does not fit them."""
    if error.name is not None and is_past(error.name):
        return InputError(f"past_key_values is the cache of another model or batch: {error}")
    return InputError(f"the tensors of this call do not fit each other: {error}")
