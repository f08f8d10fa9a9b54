"""The table of operators: what each entry says, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_fx.passes.graph.nodes import GROUPED, aten, ops
from qlora_fx.passes.lowering.example_graph import skip_gradients
from qlora_fx.passes.lowering.live_bytes import value
from qlora_fx.passes.lowering.operators import ON_GPU, OPERATORS, operator_of
from qlora_fx.passes.lowering.partition import flops_of
from qlora_fx.runtime import cpu_kernels, few_rows
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode


def tensor(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def called(target: Any, result: Any, *args: Any) -> fx.Node:
    """A call of ``target`` in a graph of its own; tensors become placeholders."""
    graph = fx.Graph()

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder("x")
        node.meta["val"] = value
        return node

    node = graph.call_function(target, tuple(given(a) for a in args))
    node.meta["val"] = result
    graph.output(node)
    return node


def loss(quant_type: str = "") -> fx.Node:
    x, weight, labels = tensor(9, 24), tensor(70, 24), tensor(9)
    options = (None, labels, -100, 1.0, 0.0, [70, 24], 64, quant_type, True)
    return called(ops.linear_cross_entropy.default, tensor(), x, [weight], *options)


WITH_WORKSPACE = (ops.linear_cross_entropy.default, ops.grouped_linear_4bit.default)
ENDS = tensor(4)
CALLS = [
    (called(aten.mm.default, tensor(3, 5), tensor(3, 4), tensor(4, 5)), 2 * 3 * 4 * 5),
    (called(aten.addmm.default, tensor(3, 5), tensor(5), tensor(3, 4), tensor(4, 5)), 120),
    (called(aten.bmm.default, tensor(2, 3, 5), tensor(2, 3, 4), tensor(2, 4, 5)), 240),
    (
        called(ops.grouped_linear.default, tensor(9, 5), tensor(9, 7), tensor(4, 5, 7), ENDS),
        2 * 9 * 5 * 7,
    ),
    (
        called(ops.grouped_outer.default, tensor(4, 5, 7), tensor(9, 5), tensor(9, 7), ENDS),
        2 * 9 * 5 * 7,
    ),
    (loss(), 4 * 9 * 70 * 24),
    (  # half of two products, and of five: what a causal mask leaves
        called(ops.attention.default, tensor(2, 6, 7, 8), *[tensor(2, n, 7, 8) for n in (6, 3, 3)]),
        2 * 6 * 7 * 7 * 8 * 2 * 2 // 2,
    ),
    (
        called(
            ops.attention_backward.default,
            tensor(2, 6, 7, 8),
            *[tensor(2, n, 7, 8) for n in (6, 6, 3, 3)],
        ),
        2 * 6 * 7 * 7 * 8 * 2 * 5 // 2,
    ),
    (called(aten.relu.default, tensor(3), tensor(3)), 0),
]


@pytest.mark.parametrize(("node", "flops"), CALLS, ids=lambda v: str(getattr(v, "target", v)))
def test_products_are_counted(node: fx.Node, flops: int) -> None:
    assert int(flops_of(node.graph)) == flops


def test_every_product_with_a_stack_is_counted() -> None:
    assert OPERATORS.keys() >= GROUPED


def test_what_takes_memory_for_itself() -> None:
    assert value(operator_of(loss()).workspace(loss()), {}) > 0
    stored = loss("nf4")
    bytes_of = [value(operator_of(n).workspace(n), {}) for n in (stored, loss())]
    assert bytes_of[0] > bytes_of[1]
    others = [operator_of(node) for node, _ in CALLS if node.target not in WITH_WORKSPACE]
    assert len(others) > 5
    assert not any(operator.workspace(CALLS[0][0]) for operator in others)


@pytest.mark.parametrize(
    ("dtype", "shape", "on_gpu"),
    [
        (torch.bfloat16, [16, 24], 4 * (2 * 384 + 4 * 6)),
        (torch.bfloat16, [16, 20], 2 * 320),
        (torch.float32, [16, 24], 4 * 384),
    ],
)
def test_experts_are_dense_one_by_one_or_on_a_gpu_together(
    dtype: torch.dtype, shape: list[int], on_gpu: int
) -> None:
    x = tensor(9, shape[1]).to(dtype)
    packed = torch.empty(4, shape[0] * shape[1] // 2, 1, dtype=torch.uint8, device="meta")
    storage = (packed, tensor(4, 6), None, None, None)
    node = called(
        ops.grouped_linear_4bit.default, tensor(9, shape[0]), x, *storage, ENDS, shape, 64, "nf4"
    )
    found = operator_of(node).workspace(node)
    assert value(found, {ON_GPU: 1}) == on_gpu
    assert value(found, {}) == dtype.itemsize * shape[0] * shape[1]


def few(dtype: torch.dtype, bias: torch.dtype, device: str, size: int = 64) -> Any:
    """A product of a token with 4-bit storage."""
    with FakeTensorMode():
        return called(
            ops.linear_4bit.default,
            None,
            torch.empty(1, size, dtype=dtype, device=device),
            *(None for _ in range(5)),
            torch.empty(8, dtype=bias, device=device),
            *(torch.empty(*shape, device=device) for shape in ((2, size), (8, 2))),
            *(1.0, [8, size], 64, "nf4"),
        )


@pytest.mark.parametrize(
    ("node", "past_python"),
    [
        (few(torch.float32, torch.float32, "cpu"), True),
        (few(torch.bfloat16, torch.bfloat16, "cpu"), True),
        (few(torch.float16, torch.float16, "cpu"), False),
        (few(torch.float32, torch.bfloat16, "cpu"), False),
        (few(torch.float32, torch.float32, "cpu", size=48), False),
        (few(torch.float32, torch.float32, "cuda"), False),
    ],
)
def test_without_gradients_products_of_few_rows_are_a_kernels(node: Any, past_python: bool) -> None:
    skip_gradients(node.graph)
    kernel = few_rows.kernels().linear_4bit.default
    assert node.target is (kernel if past_python else ops.linear_4bit.default)


def test_without_a_compiler_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "compiled", lambda *_: None)
    node = few(torch.float32, torch.float32, "cpu")
    skip_gradients(node.graph)
    assert node.target is ops.linear_4bit.default


def test_where_nothing_needs_a_gradient_the_loss_forms_none() -> None:
    node = loss()
    skip_gradients(node.graph)
    assert node.args[-1] is False
