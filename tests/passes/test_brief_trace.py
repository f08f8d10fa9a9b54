"""A trace without what AOTAutograd does for other programs is the trace with it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import qlora_fx
import pytest
import torch
from families import FAMILIES, build
from qlora_fx.passes.graph import values
from qlora_fx.passes.graph.body import signature
from qlora_fx.passes.lowering import brief_trace, compiled_body
from qlora_fx.passes.lowering.compiled_body import CompiledBody, Variant
from qlora_fx.testing import randomize_adapter
from slow import only_slow_but
from small_models import captured
from torch import fx, nn
from torch._functorch._aot_autograd import graph_compile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

BY_TYPE = {f.model_type: f for f in FAMILIES}
build_unshared = CompiledBody.build  # as it is before tests share what is compiled


def operators(graph: fx.Graph) -> list[str]:
    """What is computed, in order. Where and how a size is worked out, and whether anybody reads it, may differ."""
    place: dict[fx.Node, str] = {}

    def named(node: fx.Node) -> str:
        val = node.meta.get("val")
        return str(val) if isinstance(val, torch.SymInt) else place[node]

    lines = []
    for node in graph.nodes:
        if not isinstance(node.meta.get("val"), torch.SymInt):
            place[node] = f"%{len(place)}"
            told = {k: v for k, v in node.kwargs.items() if v is not None}
            args = fx.map_arg((node.args, told), named)
            target = node.target if node.op == "call_function" else node.op
            lines.append(f"{target} {args} {signature(node.meta.get('val'))}")
    return lines


def number(size: Any) -> Any:
    """A size of the call at hand: symbols that are equal have several names."""
    known = isinstance(size, torch.SymInt) and size.node.hint is not None
    return size.node.hint if known else size


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was traced, in order."""
    found: list[list[str]] = []
    created = brief_trace.created

    def create(*args: Any, **kwargs: Any) -> Any:
        gm = created(*args, **kwargs)
        gm.graph.eliminate_dead_code()
        found.append(operators(gm.graph))
        return gm

    monkeypatch.setattr(brief_trace, "created", create)
    return found


@pytest.mark.parametrize("model_type", only_slow_but(["llama"], BY_TYPE))
def test_a_body_computes_and_keeps_the_same_as_it_is_and_made_functional(
    model_type: str, graphs: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = compiled_body.traced
    alike = 0

    def kept(compiler: Callable[..., Any], example: Callable[..., Any]) -> tuple[Variant, Any]:
        """What the compiler makes of it, and what the forward hands to the backward."""
        examples: list[Any] = []
        variant = traced(compiler, lambda: examples.append(example()) or examples[-1])
        saved = [n.meta["val"] for n in examples[-1].partition.saved]
        tensors = [v for v in saved if isinstance(v, torch.Tensor)]
        return variant, sorted(f"{t.dtype} {[*map(number, t.shape)]}" for t in tensors)

    def both(compiler: Callable[..., Any], example: Callable[..., Any]) -> Variant:
        nonlocal alike
        graphs.clear()
        with monkeypatch.context() as patch:
            patch.setattr(compiled_body, "writes", lambda node: True)
            _, expected = kept(compiler, example)
        result, found = kept(compiler, example)
        functional, *as_it_is = graphs
        if len(as_it_is) == 1:  # otherwise something writes
            assert as_it_is == [functional]
            assert found == expected
            alike += 1
        return result

    monkeypatch.setattr(compiled_body, "traced", both)
    monkeypatch.setattr(CompiledBody, "build", build_unshared)
    family = BY_TYPE[model_type]
    batch = family.batch(3, 21)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # test_default_path.py reads them
        qmodel: Any = qlora_fx.transform(
            build(family).train(),
            example_inputs=batch,
            compute_dtype="float32",
            backend="aot_eager",
        )
    randomize_adapter(qmodel)
    qmodel(**batch)
    assert alike > 0


class Normalized(nn.Module):
    """The gradient of a norm writes: zeros, where the norm is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": nn.functional.normalize(self.up(x), dim=-1)}


@pytest.mark.parametrize("backend", only_slow_but(["aot_eager"], ["aot_eager", "inductor"]))
def test_a_gradient_that_writes_is_made_functional(backend: str, graphs: list[list[str]]) -> None:
    body = CompiledBody(captured(Normalized()).gm, backend)
    given = [
        torch.randn((5, 3, 8) if "input" in n.meta else tuple(n.meta["val"].shape)).requires_grad_()
        for n in body.inputs
    ]
    true = [v.detach().double().requires_grad_() for v in given]
    direction = torch.randn(5, 3, 6)
    (body(*given, 0)[0] * direction).sum().backward()
    (body.body(*true)[0] * direction).sum().backward()
    assert len(graphs) == 2, "traced as it is, and again"
    for mine, expected in zip(given, true, strict=True):
        torch.testing.assert_close(mine.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)


def test_a_view_of_a_dense_tensor_is_pytorchs() -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        *(((2, 3, 8), (6, 8)), ((2, 3, 8), (48,)), ((2, 3, 8), (2, 3, 2, 4))),
        *(((2, 3, 8), (-1, 4)), ((0, 3), (3, 0)), ((6,), (2, 3)), ((1, 6), (6, 1, 1))),
        *(((), (1, 1)), ((1,), ())),
    ]
    with FakeTensorMode():
        for old, new in shapes:
            for tensor in (torch.empty(old), torch.empty((*old, 2))[..., 1]):
                expected = values.any_view(tensor, new, allow_copy=True)
                found = values.view_value(tensor, new, allow_copy=True)
                assert found.shape == expected.shape
                assert found.stride() == expected.stride()
                assert found.storage_offset() == expected.storage_offset()
        transposed = torch.empty(3, 4).t()
        with pytest.raises(ValueError, match="Cannot view"):
            values.view_value(transposed, (12,), allow_copy=False)
    with FakeTensorMode(shape_env=ShapeEnv()), pytest.raises(RuntimeError, match="as many values"):
        values.view_value(torch.empty(2, 3), (7,), allow_copy=False)


def test_no_search_is_made_for_a_view_of_a_dense_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.up(x)
            return {"y": y.view(y.shape[0], y.shape[1], 2, 3).sum(-1)}

    def search(tensor: torch.Tensor, *shape: Any, allow_copy: bool) -> torch.Tensor:
        raise AssertionError(f"{tuple(tensor.shape)} as {shape}")

    monkeypatch.setattr(values, "any_view", search)
    gm = captured(Rows()).gm
    assert [n for n in gm.graph.nodes if n.target is torch.ops.aten.view.default]
    body = CompiledBody(gm, "aot_eager")
    given = [
        torch.randn(5, 3, 8) if "input" in n.meta else torch.randn(n.meta["val"].shape)
        for n in body.inputs
    ]
    torch.testing.assert_close(body(*given, 0)[0], gm(*given)[0])


def test_graphs_are_printed_for_those_who_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brief_trace.trace_log, "handlers", [])
    assert not brief_trace.is_logged()
    monkeypatch.setattr(graph_compile.aot_joint_log, "level", logging.INFO)
    monkeypatch.setattr(graph_compile.aot_joint_log, "_cache", {})
    assert brief_trace.is_logged()
    monkeypatch.undo()
    monkeypatch.setattr(brief_trace.trace_log, "handlers", [logging.NullHandler()])
    assert brief_trace.is_logged()
