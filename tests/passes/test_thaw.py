"""The pass ``thaw``: its golden, which tensors it takes, and that it does nothing the second time."""

from __future__ import annotations

from typing import Any

import pytest
from expecttest import assert_expected_inline
from peft import LoraConfig
from qlora_fx.compiler import printer
from qlora_fx.config import Config
from qlora_fx.errors import ConfigError
from qlora_fx.passes.normalize import normalize
from qlora_fx.passes.select import select
from qlora_fx.passes.thaw import is_saved, thaw
from small_models import Toy, captured
from torch import fx


def thawed(config: Config, **changes: Any) -> tuple[fx.GraphModule, bool]:
    lora = LoraConfig(r=2, lora_alpha=4, **({"target_modules": ["up"]} | changes))
    config = config.with_(lora=lora)
    gm = captured(Toy(bias=True)).gm
    for run in (normalize, select):
        gm = run(gm, config=config).graph_module
    result = thaw(gm, config=config)
    again = thaw(result.graph_module, config=config)
    assert not again.modified
    assert again.graph_module.meta["trained"] == result.graph_module.meta["trained"]
    return result.graph_module, result.modified


def test_golden(config: Config) -> None:
    gm, modified = thawed(config, modules_to_save=["head"])
    assert modified
    text = "\n".join(line for line in printer.text(gm).splitlines() if "head" in line)
    assert_expected_inline(
        text,
        """\
    %head_trained_weight: f32[5, 8] = adapter[head.trained.weight]
    %head: f32[B, S, 5] = aten.linear(%layers_1_down, %head_trained_weight)  # site head: trains as a whole (modules_to_save); not adapted
    return (%head)""",
    )


def test_nothing_asked_for_changes_nothing(config: Config) -> None:
    gm, modified = thawed(config)
    assert not modified
    assert gm.meta["trained"] == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bias": "lora_only"}, {"layers.0.up.bias", "layers.1.up.bias"}),
        (
            {"bias": "all"},
            {f"layers.{i}.{name}.bias" for i in range(2) for name in ("up", "down")},
        ),
        ({"modules_to_save": ["layers.0.down"]}, {"layers.0.down.weight", "layers.0.down.bias"}),
        ({"modules_to_save": ["layers.1"], "bias": "lora_only"}, None),
    ],
)
def test_what_trains(config: Config, changes: dict[str, Any], expected: set[str] | None) -> None:
    gm, _ = thawed(config, **changes)
    trained = gm.meta["trained"]
    if expected is None:
        expected = {f"layers.1.{n}.{leaf}" for n in ("up", "down") for leaf in ("weight", "bias")}
        expected.add("layers.0.up.bias")
    assert set(trained.values()) == expected
    inputs = {
        n.meta["stored"]: n for n in gm.graph.find_nodes(op="placeholder") if "stored" in n.meta
    }
    for copy, key in trained.items():
        assert inputs[copy].meta["trainable"]
        assert key not in inputs, "its readers read the copy"


def test_an_entry_without_parameters_is_named(config: Config) -> None:
    with pytest.raises(ConfigError, match="'score'"):
        thawed(config, modules_to_save=["score"])


def test_a_module_is_found_by_the_end_of_its_path_or_of_one_above() -> None:
    assert is_saved("model.lm_head.weight", ["lm_head"])
    assert is_saved("model.head.dense.weight", ["head"])
    assert not is_saved("model.lm_head.weight", ["model.head"])
    assert not is_saved("lm_head_norm.weight", ["lm_head"])
