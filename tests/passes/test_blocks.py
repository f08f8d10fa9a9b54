"""What a block is: of pyramids, of lists within blocks, of modules that are called again."""

from __future__ import annotations

from typing import Any

import qlora_fx
import pytest
import torch
from families import FAMILIES, build
from qlora_fx.config import Config
from qlora_fx.passes.graph.blocks import blocks
from qlora_fx.passes.outline import outline
from qlora_fx.testing import compare, randomize_adapter
from small_models import captured
from torch import nn


class Layer(nn.Module):
    """``Linear(8, wide)`` and back."""

    def __init__(self, wide: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, wide), nn.Linear(wide, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down(torch.relu(self.up(x)))
        return y


class Down(Layer):
    pass


class Stage(nn.Module):
    """Layers of one width, behind a list of two small things that are no blocks."""

    def __init__(self, wide: int, depth: int) -> None:
        super().__init__()
        self.before = nn.ModuleList([nn.LayerNorm(8), nn.ReLU()])
        self.layers = nn.ModuleList(Layer(wide) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in (*self.before, *self.layers):
            x = module(x)
        return x


class Sublayers(nn.Module):
    """A block as T5's: a list of parts of a class each."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.layer = nn.ModuleList([Layer(), Down()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layer:
            x = layer(x)
        return x


class Experts(nn.Module):
    """A block whose inner list is of one class and most of it, but none reads another."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.experts = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        y = torch.zeros_like(x)
        for expert in self.experts:
            y = y + expert(x)
        return y


class Mostly(nn.Module):
    """A block that is more than the list in it."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.attention = Layer()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.attention(x)
        for norm in self.norms:
            x = norm(x)
        return x


class Model(nn.Module):
    def __init__(self, *stages: nn.Module, times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times = times
        self.stages = nn.ModuleList(stages)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.times):
            for stage in self.stages:
                x = stage(x)
        return x


def found(model: nn.Module) -> list[Any]:
    return list(dict.fromkeys(blocks(captured(model).gm.graph).values()))


def test_blocks_of_a_pyramid_are_inside_its_stages() -> None:
    paths = [block.path for block in found(Model(Stage(6, 2), Stage(12, 1)))]
    assert paths == ["stages.0.layers.0", "stages.0.layers.1", "stages.1.layers.0"]


@pytest.mark.parametrize("kind", [Sublayers, Experts, Mostly])
def test_lists_within_blocks_are_theirs(kind: Any) -> None:
    assert [block.path for block in found(Model(kind(), kind()))] == ["stages.0", "stages.1"]


def test_a_stage_of_one_layer_is_a_block() -> None:
    paths = [block.path for block in found(Model(Stage(6, 1), Stage(12, 1)))]
    assert paths == ["stages.0", "stages.1"]


def test_each_call_of_a_module_is_a_block_and_all_share_a_body(config: Config) -> None:
    model = Model(Layer(), times=3)
    assert [tuple(block) for block in found(model)] == [("stages.0", i) for i in range(3)]
    outer = outline(captured(model).gm, config=config).graph_module
    calls = [n.target for n in outer.graph.nodes if n.op == "call_module"]
    assert calls == ["Layer"] * 3


@pytest.mark.parametrize("model_type", ["albert", "convnext"])
def test_memory_budget_reaches_each_block(model_type: str) -> None:
    """ALBERT calls one layer several times; ConvNeXt's layers are in stages, and each is called once."""
    family = next(f for f in FAMILIES if f.model_type == model_type)
    model, batch = build(family), family.batch(3, 21)
    qmodel = qlora_fx.transform(
        build(family), example_inputs=batch, compute_dtype=torch.float32, backend="aot_eager"
    )
    randomize_adapter(qmodel)
    sizes = {"batch_size": 3, "sequence_length": 21}
    kept = qlora_fx.saved_activations(qmodel, **sizes)
    assert kept.recomputation == 0
    qmodel.memory_budget = 0.0
    report = compare(model, qmodel, batch, None, all_outputs=False)
    assert report.passed, str(report)
    least = qlora_fx.saved_activations(qmodel, **sizes).split
    layers = [calls for calls in least.bodies if "Layer" in calls.name]
    assert sum(calls.calls for calls in layers) > 1
    for calls in layers:
        assert calls.recomputed == calls.body.recomputed == calls.calls
        assert calls.body.compilations == 1, "none of its calls has kept everything"
    assert least.bytes < 0.7 * kept.split.bytes
