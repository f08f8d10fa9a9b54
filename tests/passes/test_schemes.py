"""The twins of storage schemes: each has one, and what it marks is what the loss reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from qlora_fx.compiler import pipeline
from qlora_fx.config import Config, Quantization
from qlora_fx.passes.graph.nodes import is_packed, ops, placeholders, sites
from qlora_fx.passes.quantize import quantize
from qlora_fx.passes.schemes import EMISSIONS, Storage, emission_of, storage_of
from qlora_fx.runtime.schemes import SCHEMES, scheme_of
from small_models import Toy, captured
from torch import fx, nn


class Loss(nn.Module):
    """A head whose rows fill no blocks, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.up = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 5, bias=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.head(self.up(x))
        return {"loss": F.cross_entropy(logits.view(-1, 5), labels.view(-1)), "logits": logits}


LABELS = {"x": torch.zeros(2, 3, 8), "labels": torch.zeros(2, 3, dtype=torch.int64)}


def through(last: Any, config: Config, model: nn.Module, inputs: Any = None) -> fx.GraphModule:
    """The graph after the pass ``last``."""
    gm = captured(model, inputs).gm
    for stage in pipeline.PIPELINE:
        gm = stage.run(gm, config=config).graph_module
        if stage.run is last:
            break
    return gm


@pytest.mark.parametrize("kind", SCHEMES)
def test_each_scheme_has_a_twin(kind: str) -> None:
    assert SCHEMES.keys() == EMISSIONS.keys()
    quantization = Quantization(kind)
    ours, twins = scheme_of(quantization), emission_of(quantization).scheme
    assert type(ours) is type(twins)
    assert ours.parts((48, 80)) == twins.parts((48, 80))


def test_only_packed_bytes_stand_for_a_quantized_weight(config: Config) -> None:
    gm = through(quantize, config, Toy())
    packed = {n.meta["stored"] for n in placeholders(gm.graph) if is_packed(n)}
    assert packed == {f"layers.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")}


@pytest.mark.parametrize("double", [True, False])
def test_the_loss_reads_the_storage_that_the_weight_was_made_from(
    config: Config, double: bool
) -> None:
    settings = Quantization("fp4", 32, double)
    config = config.with_(
        quantization=settings, also_quantize=frozenset({"head"}), return_logits=False
    )
    gm = through(quantize, config, Loss(), LABELS)
    weight: Any = next(n for n in sites(gm.graph) if n.meta["site"].name == "head").args[1]
    assert isinstance(weight.meta["storage"], Storage)
    tensors, blocksize, quant_type = storage_of(weight)
    assert (blocksize, quant_type) == (32, "fp4")
    names = ["head.weight", "head.weight.absmax"]
    if double:
        names += ["head.weight.nested_absmax", "head.weight.offset", "nested_quant_map"]
    assert [n.meta["stored"] for n in tensors] == names
    whole = pipeline.run(captured(Loss(), LABELS).gm, config).gm
    (loss,) = whole.graph.find_nodes(op="call_function", target=ops.linear_cross_entropy.default)
    read: Any = loss.args[1]
    assert [n.meta["stored"] for n in read] == names
    assert loss.args[8:10] == (32, "fp4")
    assert "head_dequant" not in {n.name for n in whole.graph.nodes}


def test_a_mark_that_holds_nodes_does_not_leave_its_graph(config: Config) -> None:
    gm = pipeline.run(captured().gm, config).gm
    for body in gm.children():
        assert isinstance(body, fx.GraphModule)
        assert not any("storage" in n.meta for n in body.graph.nodes)
