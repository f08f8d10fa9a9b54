"""Which sizes of a body are free: the smallest by which all that it reads can be said."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from qlora_fx.config import Config
from qlora_fx.passes.graph.body import Body
from qlora_fx.passes.lower import Sizes, lower
from qlora_fx.passes.lowering.compiled_body import CompiledBody
from qlora_fx.passes.lowering.example import allowed
from qlora_fx.passes.lowering.free_sizes import (
    FreeSize,
    computed,
    formula_of,
    free_sizes,
    sizes_only,
    written,
)
from qlora_fx.passes.lowering.recorded import parts
from qlora_fx.passes.outline import outline
from qlora_fx.runtime.program import multiple
from small_models import captured
from torch import nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv

S, T = sympy.symbols("S T", positive=True, integer=True)
HEIGHT, WIDTH = FloorDiv(S - 1, 4), FloorDiv(T - 1, 4)


def test_a_size_that_only_a_stride_shows_is_passed_along() -> None:
    """One place of ``[B, S, 8]``, a view: ``[B, 8]`` with the strides ``(8 S, 1)``."""

    class Rows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": self.up(x[:, 0])}

    gm = captured(Rows(), {"x": torch.zeros(2, 6, 8)}).gm
    select = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.select.int)
    body = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    rows = body.graph.placeholder("rows")
    rows.meta["val"] = select.meta["val"]
    body.graph.output(rows)
    x = next(n for n in gm.graph.find_nodes(op="placeholder") if "input" in n.meta)
    length = x.meta["val"].shape[1].node.expr
    assert FreeSize(length, 0, None) in free_sizes([rows])


class Halved(torch.nn.Module):
    """Rows of half the length, and a block over them: ``S // 2 + 1``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.nn.functional.pad(x, (0, 0, 1, 1)).unfold(1, 2, 2).sum(-1)
        return {"y": self.layers[0](x) / x.shape[1]}


def test_a_length_that_the_capture_computed_is_a_size_of_the_bodys_own() -> None:
    gm = captured(Halved(), {"x": torch.zeros(2, 6, 8)}).gm
    x = next(n for n in gm.graph.find_nodes(op="placeholder") if "input" in n.meta)
    batch, length = (size.node.expr for size in x.meta["val"].shape[:2])
    linear = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    part = Body([n for n in gm.graph.nodes if n.op == "call_function" and n >= linear], "")
    part.finish([n for n in gm.graph.nodes if n.name == "div"])
    inner = CompiledBody(torch.fx.GraphModule(torch.nn.Module(), part.graph), "aot_eager")
    assert [size.formula.subs({batch: 3, length: 9}) for size in inner.free] == [3, 5]
    assert all(size.place for size in inner.free), "S itself is not passed"
    for rows in (5, 1, 12):
        values = [
            torch.randn([3, rows, 8] if node.meta["val"].dim() == 3 else node.meta["val"].shape)
            for node in inner.inputs
        ]
        torch.testing.assert_close(inner(*values, 0), inner.body(*values))
    assert inner.compilations == 1
    (partition,) = inner.partitions.values()
    assert partition.flops[0].free_symbols <= {batch, length}, "in the capture's symbols again"


def test_where_a_formula_is_not_enough_the_symbols_are_passed() -> None:
    """``S`` and ``S // 2`` in one body: what they have to do with each other must stay known."""
    gm = captured(Halved(), {"x": torch.zeros(2, 6, 8)}).gm
    x = next(n for n in gm.graph.find_nodes(op="placeholder") if "input" in n.meta)
    halved = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default).args[0]
    assert [size.term.is_symbol for size in free_sizes([x, halved])] == [True, True]
    assert [size.term.is_symbol for size in free_sizes([halved])] == [True, False]


def test_a_size_is_read_from_a_multiple_of_it() -> None:
    """Of pictures the inputs show patches, 4 of which are a token."""
    env = ShapeEnv()
    source = ConstantSource("tokens")
    graph = torch.fx.Graph()
    patches = graph.placeholder("patches")
    with FakeTensorMode(shape_env=env):
        tokens = env.create_symintnode(env.create_symbol(5, source), hint=5, source=source)
        patches.meta["val"] = torch.empty(3, 4 * tokens)
    output = graph.output(None)
    symbol = tokens.node.expr
    sizes = Sizes(graph)
    output.args = ((sizes(symbol), sizes(FloorDiv(symbol, 2) + 1), sizes(symbol)),)
    read = torch.fx.GraphModule(torch.nn.Module(), graph)(torch.zeros(3, 20))
    assert read == (5, 3, 5)
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)) == 1
    assert multiple(4 * symbol) == (4, symbol)
    assert multiple(symbol) == (1, symbol)
    assert multiple(4 * symbol + 1) == multiple(symbol**2) == (1, None)


def test_sizes_that_the_data_decide_are_the_inputs_where_the_capture_found_that() -> None:
    """Qwen-VL's rows of patches are the sum of what each picture has, and a multiple of its tokens."""
    env = ShapeEnv()
    source = ConstantSource("n")
    with FakeTensorMode(shape_env=env):
        n = env.create_symintnode(env.create_symbol(48, source), hint=48, source=source)
        a, b, other = (env.create_unbacked_symint() for _ in range(3))
        torch._check(n == a * b)
        torch._check(n % a == 0)
        rows: Any = a * b
        assert formula_of(rows) == n.node.expr
        assert formula_of(other) == other.node.expr
        assert formula_of(n) == n.node.expr
        assert (allowed(env, a.node.expr), allowed(env, other.node.expr)) == (1, 5)


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (HEIGHT + 1, FreeSize(HEIGHT, 1, None)),
        (6 * HEIGHT + 6, FreeSize(HEIGHT, 1, None, 6)),
        (3 * (HEIGHT + 1) * (WIDTH + 1), FreeSize((HEIGHT + 1) * (WIDTH + 1), 0, None, 3)),
        (S, None),
        (8 * S, None),
        (S + 1, None),
        (HEIGHT + WIDTH, None),
        (sympy.Integer(8), None),
    ],
)
def test_what_can_be_a_size_of_its_own(formula: sympy.Expr, expected: FreeSize | None) -> None:
    assert computed(formula, None) == expected


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        (32 * (HEIGHT + 1) * T, lambda h: 32 * h * T),
        (FloorDiv(S - 1, 8) + 1, lambda h: FloorDiv(h - 1, 2) + 1),
        (FloorDiv(HEIGHT - 3, 4) + 1, lambda h: FloorDiv(h, 4)),
        (FloorDiv(S - 1, 6), lambda h: FloorDiv(S - 1, 6)),
        (FloorDiv(S, 8), lambda h: FloorDiv(S, 8)),
        (FloorDiv(T - 1, 4), lambda h: FloorDiv(T - 1, 4)),
    ],
)
def test_a_formula_in_terms_of_a_height(formula: sympy.Expr, expected: Any) -> None:
    h = sympy.Symbol("h", positive=True, integer=True)
    found = written(formula, [FreeSize(HEIGHT, 1, None)], [h])
    assert found == expected(h)
    sizes = {S: sympy.Integer(31), T: sympy.Integer(18)}
    assert found.xreplace({**sizes, h: HEIGHT.xreplace(sizes) + 1}) == formula.xreplace(sizes)


def test_a_product_in_terms_of_a_product() -> None:
    patches = (HEIGHT + 1) * (WIDTH + 1)
    n = sympy.Symbol("n", positive=True, integer=True)
    (found,) = {written(f, [FreeSize(patches, 0, None)], [n]) for f in (32 * patches, patches * 32)}
    assert found == 32 * n
    assert (
        written(FloorDiv(patches, 4) + 1, [FreeSize(patches, 0, None)], [n]) == FloorDiv(n, 4) + 1
    )
    alone = 32 * (HEIGHT + 1)
    assert written(alone, [FreeSize(patches, 0, None)], [n]) == alone


def test_names_are_told_from_the_sizes_that_they_are_for() -> None:
    """Each ShapeEnv counts anew: a size's name may be what another is called in the formula."""
    sizes = [FreeSize(S, 0, None), FreeSize(T, 0, None)]
    assert written(S + 2 * T, sizes, [T, S]) == T + 2 * S


def test_an_input_whose_size_the_data_decide_is_taken_to_read_it() -> None:
    """Nobody else could tell that size."""
    env = ShapeEnv()
    graph = torch.fx.Graph()
    source = ConstantSource("n")
    with FakeTensorMode(shape_env=env):
        n = env.create_symintnode(env.create_symbol(5, source), hint=5, source=source)
        for name, size in (("decided", env.create_unbacked_symint()), ("shown", n)):
            node = graph.placeholder(name)
            node.meta["val"] = torch.empty(size, 8)
            graph.call_function(torch.ops.aten.sym_size.int, (node, 0))
    assert [node.name for node in sizes_only(graph.find_nodes(op="placeholder"))] == ["shown"]


class Reduced(nn.Module):
    """As SegFormer's blocks: they are told height and width, and look at every second patch of each row."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.halve = nn.Conv2d(8, 8, 2, 2)

    def forward(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        picture = x.transpose(1, 2).reshape(x.shape[0], 8, height, width)
        half = self.halve(picture)
        rows = half.reshape(x.shape[0], 8, (height // 2) * (width // 2)).transpose(1, 2)
        result: torch.Tensor = self.up(x) + (x @ rows.transpose(1, 2)) @ rows
        return result


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 4, 1)
        self.layers = nn.ModuleList([Reduced(), Reduced()])

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.stem(pixel_values)
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2).contiguous()
        for layer in self.layers:
            x = layer(x, height, width)
        return {"y": x.transpose(1, 2).reshape(-1, 8, height, width)}


def test_blocks_are_told_the_sides_of_a_picture_and_do_not_take_it(config: Config) -> None:
    """And they know of ``(H - 1) // 4 + 1`` rows as of any size; one compilation is right for all pictures."""
    model = Picture()
    capture = captured(model, {"pixel_values": torch.zeros(2, 3, 32, 40)})
    program = lower(outline(capture.gm, config=config).graph_module, backend="aot_eager")
    block, last = program.Reduced, program.epilogue
    assert isinstance(block, CompiledBody)
    assert isinstance(last, CompiledBody)
    assert (block.calls, last.calls) == (2, 1)
    for body in (block, last):
        assert not any(node.name == "pixel_values" for node in body.inputs)
        assert [size.place is None for size in body.free] == [False, True, True]
        assert not any(size.term.is_symbol for size in body.free[1:])
    assert any(recorded for recorded, _ in parts(program)), "CUDA graphs take what they are told"
    weights = dict(model.named_parameters())
    reads = list(capture.gm.graph.find_nodes(op="placeholder"))
    for shape in ((2, 3, 32, 40), (3, 3, 21, 36), (1, 3, 64, 17)):
        picture = torch.randn(shape)
        values = [weights.get(node.meta.get("stored", ""), picture) for node in reads]
        (y,) = program(*values)
        expected = model(picture)["y"]
        torch.testing.assert_close(y, expected)
        found = torch.autograd.grad(y.square().sum(), [*weights.values()])
        true = torch.autograd.grad(expected.square().sum(), [*weights.values()])
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    assert block.compilations == last.compilations == 1
