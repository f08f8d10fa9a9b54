"""Where the first nan or infinity came from: the captured graphs run operator by operator, and watched."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..compiler import printer
from ..model import QLoRAModel


@dataclass(frozen=True)
class Fault:
    """A value that is not finite, made of values that were.

    Attributes:
        site: the linear, or the module, that made it; the parameter's name where it was not finite to begin with.
        operator: what computed it, e.g. ``aten.linear``; "parameter" or "input" where nothing did.
        stage: "forward" or "backward".
    """

    site: str
    operator: str
    stage: str

    def __str__(self) -> str:
        return f"{self.site} ({self.operator}, {self.stage})"


@contextlib.contextmanager
def first_non_finite(qmodel: QLoRAModel) -> Iterator[list[Fault]]:
    """Calls in this block run uncompiled; the list gets the faults that are found, the first one first.

    Gradients are watched too, where the block calls ``backward``. Signatures that were never called run as ever.
    """
    found: list[Fault] = []
    with contextlib.ExitStack() as stack:
        for programs in qmodel.all_programs:
            for program, graph in programs.runs():
                run, prepare = program.run, program.prepare
                stack.callback(setattr, program, "run", run)
                stack.callback(setattr, program, "prepare", prepare)
                program.run, program.prepare = Watch(graph, found).run, None
        yield found


class Watch(fx.Interpreter):
    """Runs a captured graph and notes values that are not finite.

    Args:
        gm: the outer graph, or one body.
        found: gets the faults.
        block: of a body: the path of the block that it was made from, and of the one that calls it.
    """

    def __init__(
        self, gm: fx.GraphModule, found: list[Fault], block: tuple[str, str] | None = None
    ) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.found, self.block = found, block
        self.first: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_module":
            place = str(n.meta.get("module", ""))
            first = self.first.setdefault(str(n.target), place)
            args, _ = self.fetch_args_kwargs_from_env(n)
            body: Any = self.fetch_attr(str(n.target))
            return Watch(body, self.found, (first, place)).run(*args)
        result = super().run_node(n)
        if n.op in ("placeholder", "call_function"):
            self.see(n, result)
        return result

    def see(self, node: fx.Node, result: Any) -> None:
        several = result if isinstance(result, (tuple, list)) else (result,)
        for value in several:
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                continue
            if node.op == "placeholder":
                if self.block is None and not finite(value):
                    self.note(node, "forward")
                continue
            if not finite(value) and not by_intention(node) and self.reads_finite(node):
                self.note(node, "forward")
            if value.requires_grad and value.grad_fn is not None:
                hook = functools.partial(self.see_gradient, node)
                value.register_hook(hook)  # type: ignore[no-untyped-call]

    def reads_finite(self, node: fx.Node) -> bool:
        tensors = [self.env[n] for n in node.all_input_nodes if n in self.env]
        return all(finite(t) for t in tensors if isinstance(t, torch.Tensor))

    def see_gradient(self, node: fx.Node, gradient: torch.Tensor | None) -> None:
        """Called with the gradient of what ``node`` computed, in the order of backward."""
        if gradient is not None and not finite(gradient):
            self.note(node, "backward")

    def note(self, node: fx.Node, stage: str) -> None:
        if node.op == "placeholder":
            operator = "parameter" if "stored" in node.meta else "input"
            name = node.meta.get("stored") or node.meta.get("input") or node.name
        else:
            operator = printer.target(node)
            site = node.meta.get("site")
            name = site.name if site is not None else node.meta.get("module") or node.name
            if self.block is not None:
                name = self.block[1] + str(name).removeprefix(self.block[0])
        self.found.append(Fault(str(name), operator, stage))


def finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def by_intention(node: fx.Node) -> bool:
    """An infinity that the model writes itself, as masks do."""
    return any(isinstance(arg, float) and not math.isfinite(arg) for arg in node.args)
