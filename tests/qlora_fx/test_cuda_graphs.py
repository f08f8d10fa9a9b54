"""Recorded steps, where a stand-in for the GPU's recorder does again what it was shown; tests/cuda has the GPU's."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import qlora_fx
import pytest
import torch
from peft import LoraConfig
from qlora_fx.passes.lowering.recorded import can_be_recorded
from qlora_fx.runtime import cuda_graphs
from qlora_fx.runtime.cuda_graphs import Graphed, Places, Recorder, WaitsForDevice
from qlora_fx.testing import randomize_adapter
from recording import StandIn, record
from small_models import batch, tiny_llama
from torch import Tensor


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """Twice the same, the second to be recorded."""
    found = []
    for _ in range(2):
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        qmodel = qlora_fx.transform(
            tiny_llama(3), config, compute_dtype=torch.float32, backend="aot_eager"
        )
        randomize_adapter(qmodel)
        found.append(qmodel)
    return found[0], found[1]


@pytest.fixture
def pair(models: tuple[Any, Any]) -> tuple[Any, Any, list[str]]:
    plain, qmodel = models
    happened: list[str] = []
    for one in models:
        one.train().zero_grad()
        one.memory_budget = 1.0
    state = plain.adapter_state_dict()
    qmodel.load_adapter_state_dict(state)
    record(qmodel, happened)
    return plain, qmodel, happened


def parts(qmodel: Any) -> list[Graphed]:
    return [m for p in qmodel.programs for m in p.graphed.children() if isinstance(m, Graphed)]


def gradients(qmodel: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in qmodel.adapter_parameters()}


def step(qmodel: Any, values: dict[str, Tensor]) -> Tensor:
    loss: Tensor = qmodel(**values).loss
    loss.backward()
    return loss.detach()


def same(plain: Any, qmodel: Any, values: dict[str, Tensor]) -> None:
    torch.testing.assert_close(step(qmodel, values), step(plain, values))
    mine, true = gradients(qmodel), gradients(plain)
    assert all(bool(g.any()) for g in true.values())
    torch.testing.assert_close(mine, true)


def test_steps_are_those_of_launches_one_by_one(pair: tuple[Any, Any, list[str]]) -> None:
    """At two shapes, with updates between, which the recordings must see."""
    plain, qmodel, happened = pair
    optimizers = [torch.optim.AdamW(m.parameters(), 1e-2) for m in (plain, qmodel)]
    for i in range(5):
        for rows, tokens in ((3, 21), (2, 17)):
            same(plain, qmodel, batch(rows, tokens, seed=i))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    recording = ["warm up", "warm up", "record", "record", "replay forward", "replay backward"]
    replays = ["replay forward", "replay backward"]
    assert happened == recording * 2 + replays * 4
    (part,) = parts(qmodel)
    assert len(part.recordings) == 2
    weights = {id(t) for t in qmodel.base.store.tensors.values()}
    for one in part.recordings.values():
        held = [v for v in one.values if isinstance(v, Tensor)]
        assert sum(id(v) in weights for v in held) == sum(part.places.stored), "read where they lie"


def test_gradients_add_up_and_are_kept(pair: tuple[Any, Any, list[str]]) -> None:
    plain, qmodel, _ = pair
    for i in range(3):
        for micro in range(2):
            same(plain, qmodel, batch(seed=10 * i + micro))
        kept = [p.grad for _, p in qmodel.adapter_parameters()]
        before = [g.clone() for g in kept]
        for one in (plain, qmodel):
            one.zero_grad()
        same(plain, qmodel, batch(seed=7))
        torch.testing.assert_close(kept, before, rtol=0, atol=0)
        for one in (plain, qmodel):
            one.zero_grad()


def test_a_second_forward_before_the_backward(pair: tuple[Any, Any, list[str]]) -> None:
    plain, qmodel, happened = pair
    for i in range(3):
        same(plain, qmodel, batch(seed=i))
    for one in (plain, qmodel):
        one.zero_grad()
    count = len(happened)
    for one in (plain, qmodel):
        first, second = one(**batch(seed=1)).loss, one(**batch(seed=2)).loss
        with torch.no_grad():
            one(**batch(seed=3))
        (first - 0.5 * second).backward()
    torch.testing.assert_close(gradients(qmodel), gradients(plain))
    assert happened[count:] == ["replay forward", "replay backward"], "the second ran by itself"
    loss = qmodel(**batch(seed=1)).loss  # let go without a backward
    del loss
    same(plain, qmodel, batch(seed=4))
    assert happened[-1] == "replay backward"


def test_a_second_backward_after_another_forward_is_refused() -> None:
    part = product()
    w = torch.ones(3, 2, requires_grad=True)
    for _ in range(3):
        part(torch.ones(4, 3), w)[0].sum().backward()
    y, _ = part(torch.ones(4, 3), w)
    y.sum().backward(retain_graph=True)
    assert w.grad is not None
    assert torch.equal(w.grad, torch.full((3, 2), 16.0))
    with torch.no_grad():
        for _ in range(3):
            part(torch.zeros(5, 3), w)
    assert len(part.recordings) == 2, "of another shape, in the same memory"
    with pytest.raises(qlora_fx.GraphError, match="backward a second time, after another forward"):
        y.sum().backward()


@pytest.mark.slow
def test_other_budgets_are_recorded_anew(pair: tuple[Any, Any, list[str]]) -> None:
    plain, qmodel, happened = pair
    for i in range(3):
        same(plain, qmodel, batch(seed=i))
    for one in (plain, qmodel):
        one.memory_budget = 0.0
    assert not any(p.graphed for p in qmodel.programs), (
        "what was recorded is gone; on a CPU nothing else is"
    )
    record(qmodel, happened)
    for i in range(4):
        same(plain, qmodel, batch(seed=i))
    assert happened.count("record") == 4


def test_another_adapter_is_recorded_anew(pair: tuple[Any, Any, list[str]]) -> None:
    plain, qmodel, happened = pair
    for i in range(3):
        same(plain, qmodel, batch(seed=i))
    for one in (plain, qmodel):
        one.add_adapter("other", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        one.set_adapter("other")
    try:
        randomize_adapter(plain)
        qmodel.load_adapter_state_dict(plain.adapter_state_dict("other"), "other")
        for i in range(4):
            for one in (plain, qmodel):
                one.zero_grad()
            same(plain, qmodel, batch(seed=i))
        assert happened.count("record") == 4
    finally:
        for one in (plain, qmodel):
            one.set_adapter("default")
            one.delete_adapter("other")


class Product(torch.nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x @ w, x * 2


def product() -> Graphed:
    return Graphed(Product(), Places([False, True]), tuple, lambda: StandIn([]))


def test_what_waits_for_the_device_is_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told once; a recording that fails would leave PyTorch's random numbers unusable."""

    def waits(self: StandIn, work: Any) -> None:
        raise WaitsForDevice("called a synchronizing CUDA operation")

    monkeypatch.setattr(StandIn, "warm_up", waits)
    part, w = product(), torch.randn(3, 2, requires_grad=True)
    with pytest.warns(UserWarning, match="launched one by one, for an operator in them waits"):
        found = [part(torch.ones(4, 3), w)[0] for _ in range(6)]
    assert not part.recordings
    assert all(torch.equal(y, torch.ones(4, 3) @ w) for y in found)
    found[-1].sum().backward()
    assert w.grad is not None


@pytest.mark.parametrize(
    ("said", "expected"),
    [("called a synchronizing CUDA operation", WaitsForDevice), ("out of memory", RuntimeError)],
)
def test_waiting_is_found_before_it_is_recorded(
    monkeypatch: pytest.MonkeyPatch, said: str, expected: type[Exception]
) -> None:
    """By PyTorch's own debug mode, which is set back."""
    modes: list[Any] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in (
        ("current_stream", lambda device: stream),
        ("stream", lambda stream: nullcontext()),
        ("get_sync_debug_mode", lambda: 1),
        ("set_sync_debug_mode", modes.append),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    recorder = StandIn([])
    recorder.stream = stream

    def work() -> list[Tensor]:
        raise RuntimeError(said)

    with pytest.raises(expected, match=said):
        Recorder.warm_up(recorder, work)
    assert modes == ["error", 1]
    Recorder.warm_up(recorder, list)
    assert modes == ["error", 1, "error", 1]


def test_counting_shapes_takes_no_end_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "COUNTED", 4)
    part, w = product(), torch.ones(3, 2)
    for rows in range(1, 10):
        part(torch.ones(rows, 3), w)
    assert len(part.seen) <= 4
    for _ in range(3):
        part(torch.ones(20, 3), w)
    assert len(part.recordings) == 1


def test_another_number_of_recomputed_blocks_is_another_recording() -> None:
    recomputed = [0]
    part = Graphed(Product(), Places([False, True]), lambda: tuple(recomputed), lambda: StandIn([]))
    for recomputed[0] in (0, 0, 0, 1, 1, 1):
        part(torch.ones(4, 3), torch.ones(3, 2))
    assert len(part.recordings) == 0, "every weight was another one"
    w = torch.ones(3, 2)
    for recomputed[0] in (0, 0, 0, 1, 1, 1):
        part(torch.ones(4, 3), w)
    assert len(part.recordings) == 2


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_caller_keeps_is_not_overwritten(grad: bool) -> None:
    part, w = product(), torch.ones(3, 2, requires_grad=grad)
    kept = []
    for i in range(6):
        y, doubled = part(torch.full((4, 3), float(i)), w)
        if grad:
            y.sum().backward()
        kept.append((y.detach(), doubled))
    assert len(part.recordings) == 1
    for i, (y, doubled) in enumerate(kept):
        assert bool((y == 3.0 * i).all())
        assert bool((doubled == 2.0 * i).all())


def test_more_shapes_than_are_recorded_are_told_once(
    pair: tuple[Any, Any, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, qmodel, happened = pair
    monkeypatch.setattr(cuda_graphs, "LIMIT", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            for tokens in (11, 12, 13, 14):
                same(plain, qmodel, batch(2, tokens))
    said = [str(w.message) for w in caught if "cuda_graphs" in str(w.message)]
    assert said == [
        "cuda_graphs: 2 shapes are recorded, and others run without; rows padded to few lengths (pad_to_multiple_of) or "
        "packed have fewer"
    ]
    assert happened.count("record") == 4


def test_what_waits_for_the_device_is_left_out(pair: tuple[Any, Any, list[str]]) -> None:
    """The mask's kind and the rows with a label: prologue and epilogue."""
    _, qmodel, _ = pair
    (program,) = (p for p in qmodel.programs if p.calls)
    kinds = [type(m).__name__ for m in program.graphed.children()]
    assert kinds == ["GraphModule", "Graphed", "GraphModule"]
    (part,) = (m for m in program.graphed.children() if isinstance(m, Graphed))
    calls = list(part.part.graph.find_nodes(op="call_module"))
    assert len(calls) == 3, "one for each layer"


aten = torch.ops.aten


@pytest.mark.parametrize(
    ("targets", "can"),
    [
        ([aten.relu.default], True),
        ([aten.relu_.default], False),
        ([aten.relu.default, aten.relu_.default], True),
        ([aten.alias.default, aten.t.default, aten.relu_.default], False),
        ([aten.relu.default, aten.t.default, aten.relu_.default], True),
        ([aten.nonzero.default], False),
        ([aten._local_scalar_dense.default], False),
        ([torch.ops.qlora_fx.mask_kind.default], False),
        ([torch.ops.qlora_fx.mask_sequences.default], False),
        ([aten.masked_scatter.default], False),
        ([torch.ops.qlora_fx.masked_rows.default], True),
        ([torch.ops.qlora_fx.recurrence.default], False),
    ],
)
def test_what_may_be_recorded(targets: list[Any], can: bool) -> None:
    graph = torch.fx.Graph()
    last = graph.placeholder("x")
    for target in targets:
        last = graph.call_function(target, (last,))
    assert recordable(graph, torch.empty(3)) is can


@pytest.mark.parametrize(("dtype", "can"), [(torch.int64, True), (torch.bool, False)])
def test_rows_by_number_are_recorded_and_by_mask_are_not(dtype: torch.dtype, can: bool) -> None:
    """How many a mask takes is known to the device alone."""
    graph = torch.fx.Graph()
    x, index = graph.placeholder("x"), graph.placeholder("index")
    graph.call_function(aten.index.Tensor, (x, [None, index]))
    assert recordable(graph, torch.empty(3, dtype=dtype)) is can


def recordable(graph: torch.fx.Graph, val: Tensor) -> bool:
    for node in graph.nodes:
        node.meta["val"] = val
    body: Any = SimpleNamespace(body=torch.fx.GraphModule(torch.nn.Module(), graph))
    return can_be_recorded(body)


def test_arguments_that_cannot_be_honoured(models: tuple[Any, Any]) -> None:
    for given, told in (
        ({"cuda_graphs": "yes"}, r"cuda_graphs='yes'; accepted: True, False"),
        ({"cuda_graphs": True}, r"cuda_graphs=True and the model is on cpu; accepted: False"),
        ({"cuda_graphs": True, "backend": "eager"}, r"with backend='eager'; accepted: False, or"),
    ):
        with pytest.raises(qlora_fx.ConfigError, match=told):
            qlora_fx.transform(tiny_llama(1), **given)  # type: ignore[arg-type]
    with pytest.raises(qlora_fx.ConfigError, match="the model is on cpu"):
        models[0].cuda_graphs = True
    assert models[0].cuda_graphs is False
