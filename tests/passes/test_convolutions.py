"""The pass ``convolutions``: its golden, what it leaves alone, numbers compiled, one compilation for all lengths."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import qlora_fx
import pytest
import torch
from expecttest import assert_expected_inline
from peft import LoraConfig
from qlora_fx.compiler import printer
from qlora_fx.config import Config
from qlora_fx.passes.convolutions import convolutions
from qlora_fx.passes.graph.nodes import ops
from qlora_fx.passes.graph.values import fake_value
from qlora_fx.passes.lowering.compiled_body import CompiledBody
from qlora_fx.testing import compare, randomize_adapter
from slow import only_slow_but
from small_models import captured
from torch import nn

X = {"x": torch.zeros(2, 5, 8)}


class Mixer(nn.Module):
    """A linear below a convolution over time and one above it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace()
        self.up = nn.Linear(8, 12)
        self.convolution = nn.Conv1d(12, 12, **({"kernel_size": 3, "padding": 2} | options))
        self.down = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.up(x).transpose(1, 2)
        y = self.convolution(y)[..., : x.shape[1]].transpose(1, 2)
        return {"y": self.down(torch.tanh(y))}


def test_golden(config: Config) -> None:
    gm = captured(Mixer(kernel_size=2, padding=1, groups=12), X).gm
    assert convolutions(gm, config=config).modified
    gm.recompile()
    text = "\n".join(line for line in printer.text(gm).splitlines() if "%convolution" in line)
    assert_expected_inline(
        text,
        """\
    %convolution_weight: f32[12, 1, 2] = stored[convolution.weight]
    %convolution_bias: f32[12] = stored[convolution.bias]
    %convolution_conv1d_padded: f32[B, 12, S + 2] = aten.constant_pad_nd(%transpose, [1, 1])
    %convolution_conv1d_taps: f32[12, 2] = aten.select(%convolution_weight, 1, 0)
    %convolution_conv1d_shifted: f32[B, 12, S + 1] = aten.slice(%convolution_conv1d_padded, 2, 0, -1)
    %convolution_conv1d_tap: f32[12, 1] = aten.slice(%convolution_conv1d_taps, 1, 0, 1)
    %convolution_conv1d_part: f32[B, 12, S + 1] = aten.mul(%convolution_conv1d_shifted, %convolution_conv1d_tap)
    %convolution_conv1d_shifted_1: f32[B, 12, S + 1] = aten.slice(%convolution_conv1d_padded, 2, 1, 9223372036854775807)
    %convolution_conv1d_tap_1: f32[12, 1] = aten.slice(%convolution_conv1d_taps, 1, 1, 2)
    %convolution_conv1d_part_1: f32[B, 12, S + 1] = aten.mul(%convolution_conv1d_shifted_1, %convolution_conv1d_tap_1)
    %convolution_conv1d_sum: f32[B, 12, S + 1] = aten.add(%convolution_conv1d_part, %convolution_conv1d_part_1)
    %convolution_conv1d_bias: f32[12, 1] = aten.unsqueeze(%convolution_bias, 1)
    %convolution_conv1d_biased: f32[B, 12, S + 1] = aten.add(%convolution_conv1d_sum, %convolution_conv1d_bias)
    %slice_1: f32[B, 12, S] = aten.slice(%convolution_conv1d_biased, 2, None, %sym_size)""",
    )


class Patches(nn.Module):
    """As ConvNeXt: what is convolved has its channels last, and what has them first is added to the result."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 2, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.convolution(x.permute(0, 3, 1, 2))
        return {"y": (y + torch.zeros(y.shape)).flatten(2)}


def test_a_result_lies_in_memory_as_it_was_captured(config: Config) -> None:
    """What follows was traced with it: other strides are refused by Inductor's code for a block that reads it."""
    gm = captured(Patches(), {"x": torch.randn(2, 8, 6, 3)}).gm
    (added,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    before = str(added.meta["val"].stride())
    assert convolutions(gm, config=config).modified
    (new,) = gm.graph.find_nodes(op="call_function", target=ops.convolution.default)
    assert new.meta["val"].stride(1) == 1
    again = fake_value(gm.graph, added.target, added.args, dict(added.kwargs))
    assert str(again.stride()) == before


def test_twice_is_once(config: Config) -> None:
    for options in ({"groups": 12}, {"dilation": 2}):
        gm = captured(Mixer(**options), X).gm
        assert convolutions(gm, config=config).modified
        assert not convolutions(gm, config=config).modified


def test_an_input_without_a_batch_is_left_alone(config: Config) -> None:
    class Unbatched(Mixer):
        def forward(self, x: torch.Tensor) -> Any:
            return {"y": self.convolution(self.up(x[0]).mT)}

    gm = captured(Unbatched(), X).gm
    assert not convolutions(gm, config=config).modified


OPTIONS: dict[str, dict[str, Any]] = {
    "short depthwise": {"groups": 12},
    "short depthwise, as long as its input": {"groups": 12, "padding": "same", "kernel_size": 4},
    "wide depthwise": {"groups": 12, "kernel_size": 9, "padding": 8},
    "dense": {},
    "dilated": {"dilation": 2, "bias": False},
}


@pytest.mark.parametrize(
    ("name", "backend"),
    only_slow_but(
        [("dense", "aot_eager")], [("dense", "aot_eager"), *((n, "inductor") for n in OPTIONS)]
    ),
)
def test_gradients_are_right_and_every_length_is_one_compilation(name: str, backend: str) -> None:
    model = Mixer(**OPTIONS[name])
    qmodel = qlora_fx.transform(
        copy.deepcopy(model),
        LoraConfig(r=4, target_modules="all-linear"),
        compute_dtype=torch.float32,
        example_inputs={"x": torch.randn(3, 21, 8)},
        backend=backend,
    )
    randomize_adapter(qmodel)
    for rows, tokens in ((3, 21), (2, 17), (16, 4), (5, 64)):
        batch = {"x": torch.randn(rows, tokens, 8)}
        report = compare(model, qmodel, batch)
        assert report.passed, str(report)
    bodies = [m for m in all_modules(qmodel) if isinstance(m, CompiledBody)]
    assert bodies
    assert all(b.compilations == len(b.compiled) for b in bodies)


def all_modules(qmodel: Any) -> list[nn.Module]:
    return [m for program in qmodel.programs for m in program.run.modules()]
