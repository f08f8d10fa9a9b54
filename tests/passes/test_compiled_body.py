"""One body of a program: what the compiler relied on is checked, and sizes of one body bind no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qlora_fx.passes.lowering import compiled_body, warm_up
from qlora_fx.passes.lowering.compiled_body import CompiledBody, aot_eager
from qlora_fx.passes.lowering.example import Example
from qlora_fx.passes.lowering.example_graph import tuple_output
from small_models import captured
from torch._inductor import config as inductor_config
from torch._inductor import memory
from torch._inductor.exc import InvalidCxxCompiler


def run(body: CompiledBody, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    values = []
    for node in body.inputs:
        val = node.meta["val"]
        shape = (rows, 3, 8) if "input" in node.meta else tuple(val.shape)
        values.append(torch.randn(shape, generator=generator))
    result: torch.Tensor = body(*values, 0)[0]
    eager = body.body(*values)[0]
    torch.testing.assert_close(result, eager)
    return result


def test_a_guard_that_the_compiler_adds_is_checked_before_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for Inductor that writes code for fewer than ten rows, or for ten and more."""
    written: list[bool] = []

    def compile_fx(gm: Any, args: Any, **_: Any) -> Any:
        few = bool(args[body_input].shape[0] < 10)
        written.append(few)
        run = aot_eager(Recompiled(gm, args))

        def checked(*values: Any) -> Any:
            assert (values[body_input].shape[0] < 10) is few
            return run(*values)

        return checked

    class Recompiled:
        def __init__(self, gm: Any, args: Any) -> None:
            self.gm, self.args, self.partition = gm, args, None

    body = CompiledBody(captured().gm, "inductor")
    body_input = next(i for i, n in enumerate(body.inputs) if "input" in n.meta)
    monkeypatch.setattr(compiled_body, "compile_fx", compile_fx)
    for rows in (4, 7, 1, 12, 30, 5):
        run(body, rows)
    assert written == [True, False]
    assert body.compilations == 2


def test_without_guards_all_sizes_share_one_program() -> None:
    body = CompiledBody(captured().gm, "aot_eager")
    for rows in (4, 1, 12):
        run(body, rows)
    assert body.compilations == 1
    (variant,) = next(iter(body.compiled.values()))
    assert variant.holds is None


def test_compiling_one_body_does_not_fix_the_sizes_of_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the compiler fixes stays within the compilation: the capture's own sizes are free afterwards."""

    def compile_fx(gm: Any, args: Any, **_: Any) -> Any:
        int(args[len(body.inputs)])  # fixes the rows
        return lambda *values: gm(*values)

    gm = captured().gm
    body = CompiledBody(gm, "inductor")
    monkeypatch.setattr(compiled_body, "compile_fx", compile_fx)
    run(body, 4)
    run(body, 6)
    assert body.compilations == 2
    shapes = [n.meta["val"].shape for n in body.inputs if "input" in n.meta]
    assert all(isinstance(shape[0], torch.SymInt) for shape in shapes)
    assert all(shape[0].node.expr.is_symbol for shape in shapes)


def test_strides_that_a_forward_saves_are_formulas_for_the_backward() -> None:
    gm = captured().gm
    body = CompiledBody(gm, "aot_eager")
    example: Example = body.example(compiled_body.Key(()), (4, 3))
    symbol = str(example.free[0].node.expr)
    assert isinstance(example.env.evaluate_symexpr(f"8*{symbol}"), torch.SymInt)


class Rotated(torch.nn.Module):
    """What passes by a rotary embedding of the whole head is empty; transformers' gpt_neox_japanese views the result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.linear(x).unflatten(2, (2, 4)).transpose(1, 2)
        whole = torch.cat((heads[..., :4] * 2, heads[..., 4:]), -1)
        return whole.view(-1, *whole.shape[2:])


def test_a_tensor_is_copied_where_only_empty_ones_stand_beside_it() -> None:
    gm = captured(Rotated()).gm
    aten = torch.ops.aten
    assert len(gm.graph.find_nodes(op="call_function", target=aten.cat.default)) == 1
    body = CompiledBody(gm, "inductor")
    copied = tuple_output(gm).graph
    assert not copied.find_nodes(op="call_function", target=aten.cat.default)
    run(body, 4)
    assert body.compilations == 1


def test_tensors_that_are_not_empty_stay_side_by_side() -> None:
    class Both(Rotated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return torch.cat((y, x[..., 8:], x), -1)

    gm = captured(Both()).gm
    cat = torch.ops.aten.cat.default
    copied = tuple_output(gm).graph
    assert len(copied.find_nodes(op="call_function", target=cat)) == 1


class Resized(torch.nn.Module):
    """As positions are for each picture, whose height is read from a tensor (SigLIP 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.nn.Parameter(torch.randn(1, 3, 8, 8))

    def forward(self, sizes: torch.Tensor) -> torch.Tensor:
        size: Any = (sizes[0].item(), 4)
        torch._check(size[0] > 0)  # type: ignore[no-untyped-call]
        resize = torch.nn.functional.interpolate
        return resize(self.positions, size, mode="bilinear", antialias=True).sum()


def test_numbers_that_the_data_decide_are_in_the_range_that_the_capture_found() -> None:
    module, sizes = Resized(), torch.tensor([5])
    gm = captured(module, {"sizes": sizes}).gm
    asserted = torch.ops.aten._assert_scalar.default
    for node in gm.graph.find_nodes(op="call_function", target=asserted):
        gm.graph.erase_node(node)  # as bodies are without what nobody reads
    body = CompiledBody(gm, "aot_eager")
    known = {"sizes": sizes, "positions": module.positions.detach()}
    result = body(*(known[n.name] for n in body.inputs), 0)[0]
    torch.testing.assert_close(result, module(sizes).detach())


class Transposed(torch.nn.Module):
    """As a layer norm over channels that stand before positions has it in its backward (SqueezeBERT)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift, self.weight = (
            torch.nn.Parameter(torch.randn(48, generator=torch.Generator().manual_seed(i)))
            for i in range(3)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y = (y * self.scale + self.shift).transpose(1, 2)
        rows = ((x + y).transpose(1, 2) - z) * z
        total = (x.transpose(1, 2) * self.weight * rows).sum(2, keepdim=True)
        return rows * total


def test_vectorized_outer_loops_do_not_mix_rows() -> None:
    """github.com/pytorch/pytorch/issues/185702."""
    module = Transposed()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(3, *shape, generator=generator)
        for name, shape in (("x", (48, 21)), ("y", (21, 48)), ("z", (21, 1)))
    }
    known = inputs | {name: p.detach() for name, p in module.named_parameters()}
    body = CompiledBody(captured(module, inputs).gm, "inductor")
    result = body(*(known[n.meta.get("stored") or n.name] for n in body.inputs), 0)[0]
    torch.testing.assert_close(result, module(**inputs), rtol=1e-4, atol=1e-2)


class Pooled(torch.nn.Module):
    """As Funnel halves its tokens: of 21 the last window has one."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(4, generator=torch.Generator().manual_seed(0)))
        self.pool = (torch.nn.functional.avg_pool2d, torch.nn.functional.avg_pool3d)[dims - 2]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.pool(x * self.scale, 2, ceil_mode=True)
        return result * result


@pytest.mark.parametrize("dims", [2, 3])
def test_the_gradient_of_a_window_that_is_cut_off_is_divided_by_what_is_in_it(dims: int) -> None:
    """github.com/pytorch/pytorch/issues/198119."""
    module = Pooled(dims)
    x = torch.randn(2, *[5] * (dims - 1), 21, 4, generator=torch.Generator().manual_seed(1))
    body = CompiledBody(captured(module, {"x": x}).gm, "inductor")
    gradients = []
    for run in (
        module,
        lambda x: body(*(module.scale if "stored" in n.meta else x for n in body.inputs), 0)[0],
    ):
        gradients.append(torch.autograd.grad(run(x).sum(), module.scale))
    torch.testing.assert_close(*gradients)


class AddedTo(torch.nn.Module):
    """As experts add to their tokens' states, which a norm reads (A.X K2)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(48, generator=torch.Generator().manual_seed(0)))

    def forward(
        self, x: torch.Tensor, experts: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        empty = torch.zeros(x.shape[0] * x.shape[1], 48)
        added = empty.index_put((tokens,), experts @ experts.T @ experts, accumulate=True)
        y = added.view(x.shape) + x
        return y, y * self.scale * x[..., :1]


def test_what_reads_a_buffer_waits_for_what_adds_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """github.com/pytorch/pytorch/issues/185509: in any order that Inductor allows, results are right."""

    def last_first(nodes: list[Any], *told: Any) -> list[Any]:
        memory.prepare_planning_info(nodes, *told)
        left, order = list(nodes), []
        while left:
            waiting = set(left)
            order.append(next(n for n in reversed(left) if not waiting & n.mpi_node.pred_nodes))
            left.remove(order[-1])
        return order

    monkeypatch.setattr(memory, "reorder_for_peak_memory", last_first)
    module = AddedTo()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(3, 21, 48, generator=generator),
        "experts": torch.randn(126, 48, generator=generator),
        "tokens": torch.randint(0, 63, (126,), generator=generator),
    }
    known = inputs | {name: p.detach() for name, p in module.named_parameters()}
    body = CompiledBody(captured(module, inputs).gm, "inductor")
    with inductor_config.patch(force_disable_caches=True):
        result = body(*(known[n.meta.get("stored") or n.name] for n in body.inputs), 0)
    torch.testing.assert_close(result, module(**inputs), rtol=1e-4, atol=1e-2)


class Shifted(torch.nn.Module):
    """As encoder-decoders shift their labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.new_zeros(x.shape)
        y[:, 1:] = x[:, :-1].clone()
        result: torch.Tensor = self.up(y + x.mean(1, keepdim=True))
        return result


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_a_program_for_two_is_none_for_one(backend: str) -> None:
    """Of two tokens one is shifted, which the compiler takes for something to broadcast."""
    module = Shifted()
    body = CompiledBody(captured(module, {"x": torch.zeros(3, 5, 8)}).gm, backend)
    weight = module.up.weight.detach()
    for tokens in (5, 2, 1, 7):
        x = torch.randn(3, tokens, 8)
        torch.testing.assert_close(body(weight, x, 0)[0], module(x))


def test_a_machine_without_a_compiler_is_told_where_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def missing() -> None:
        raise InvalidCxxCompiler

    monkeypatch.setattr(warm_up, "compile_headers", missing)
    monkeypatch.setattr(warm_up, "pick_vec_isa", missing)
    started = warm_up.WarmUp()
    started.start()
    for thread in started.threads:
        thread.join()
    assert capfd.readouterr().err == ""
