"""``qlora_fx.testing.check`` passes what is right and names the stage that broke what is not."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from qlora_fx.compiler import pipeline
from qlora_fx.passes.graph.nodes import aten
from qlora_fx.passes.lowering.compiled_body import CompiledBody
from qlora_fx.testing.check import Float64, Oracle, check, compare
from small_models import batch, tiny_gpt2, tiny_llama
from torch import fx, nn
from transformers import PretrainedConfig

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}


def test_check_prints_a_verdict_and_the_worst_sites(capsys: pytest.CaptureFixture[str]) -> None:
    for model in (tiny_llama(), tiny_gpt2()):
        report = check(model, batch(), LoraConfig(**LORA), backend="eager", stages=True)
        assert report.passed
        assert report.culprit == ""
        stages = [stage.name for stage in pipeline.PIPELINE]
        assert list(report.stages) == ["capture", *stages, "lower"]
        printed = capsys.readouterr().out
        assert f"{type(model).__name__}: passed" in printed
        assert "output logits:" in printed
        assert "lora_A" in printed


class Rotated(nn.Module):
    """By a table of complex numbers, as Llama 4 turns the patches of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.config = PretrainedConfig()
        self.up, self.down = nn.Linear(12, 8), nn.Linear(8, 12)
        self.turns = nn.Buffer(torch.polar(torch.ones(4), torch.arange(4.0)), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        pairs = torch.view_as_complex(self.up(x).unflatten(-1, (4, 2)))
        return {"y": self.down(torch.view_as_real(pairs * self.turns).flatten(-2))}


def test_tables_of_complex_numbers_keep_both_parts() -> None:
    """``Module.to(torch.float64)`` drops the imaginary one: the truth was wrong, not the model."""
    batch = {"x": torch.randn(2, 5, 12)}
    report = check(Rotated(), batch, LoraConfig(**LORA), backend="eager", quiet=True)
    assert report.passed, str(report)


def halve_a_scale(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.name.endswith("_scaled"))
    node.args = (node.args[0], node.args[1] / 2)


def double_an_absmax(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.name.endswith("_absmax_offset"))
    node.args = (node.args[0], node.args[0])


def drop_a_bias(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.find_nodes(op="call_function", target=aten.linear.default))
    node.args = node.args[:2]


def detach_a_branch(gm: fx.GraphModule) -> None:
    """Values stay right; only gradients are lost."""
    node = next(n for n in gm.graph.nodes if n.name.endswith("_lora_a"))
    with gm.graph.inserting_after(node):
        cut = gm.graph.call_function(aten.detach.default, (node,))
    cut.meta = dict(node.meta)
    node.replace_all_uses_with(cut, delete_user_cb=lambda u: u is not cut)


@pytest.mark.parametrize(
    ("stage", "spoil"),
    [
        ("normalize", drop_a_bias),
        ("quantize", double_an_absmax),
        ("adapt", halve_a_scale),
        ("adapt", detach_a_branch),
    ],
)
def test_check_names_the_stage_that_broke_the_model(
    stage: str, spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = next(s for s in pipeline.PIPELINE if s.name == stage)

    def broken(gm: fx.GraphModule, *, config: Any) -> Any:
        result = original.run(gm, config=config)
        spoil(result.graph_module)
        return result

    broken.__name__ = stage
    stages = tuple(replace(s, run=broken) if s is original else s for s in pipeline.PIPELINE)
    monkeypatch.setattr(
        pipeline.run, "__kwdefaults__", {**pipeline.run.__kwdefaults__, "stages": stages}
    )  # type: ignore[attr-defined]
    report = check(tiny_llama(1), batch(), LoraConfig(**LORA), backend="eager", quiet=True)
    assert not report.passed
    assert report.culprit == stage, str(report)
    assert "FAILED" in str(report)
    assert "<- introduced here" in str(report)


def test_check_leaves_the_model_as_it_is() -> None:
    model = tiny_llama(1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    check(model, batch(), LoraConfig(**LORA), backend="eager", quiet=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model(**batch())


def test_the_oracle_is_the_reference_definition_of_lora() -> None:
    """Merged by hand for one linear: ``x (W + s B A)^T``, W dequantized by bitsandbytes itself."""
    import qlora_fx
    import bitsandbytes as bnb
    from qlora_fx.testing.check import randomize_adapter

    model = tiny_llama(1)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
    qmodel = qlora_fx.transform(tiny_llama(1), lora, backend="eager", compute_dtype=torch.float32)
    randomize_adapter(qmodel)
    name = "model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(name)
    packed, state = bnb.functional.quantize_4bit(
        linear.weight.data, quant_type="nf4", compress_statistics=True
    )
    adapter = dict(qmodel.adapter_parameters())
    a, b = (adapter[f"{name}.lora_{x}.weight"].detach().double() for x in "AB")
    state.shape = torch.Size(
        (1, packed.numel() * 2)
    )  # rows of 48 fill no blocks: see runtime/ops.py
    base = bnb.functional.dequantize_4bit(packed, state).view(linear.weight.shape)
    merged = base.double() + 2.0 * b @ a
    oracle = Oracle(model, qmodel.base)
    torch.testing.assert_close(oracle.parameters()[f"{name}.weight"], merged, rtol=1e-12, atol=0)


def test_float64_mode_keeps_casts_to_float32_in_float64() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with Float64():
        assert x.float().dtype == x.to(torch.float32).dtype == torch.float64
        assert torch.softmax(x, 0, dtype=torch.float32).dtype == torch.float64


def test_every_site_is_compared() -> None:
    model = tiny_llama(1)
    report = check(model, batch(), LoraConfig(**LORA), backend="eager", quiet=True)
    assert len(report.sites) == 7
    assert all(line.norm > 0 for line in report.sites)


@pytest.mark.slow
def test_calls_after_a_comparison_are_compiled() -> None:
    """``compare`` looks at logits that training leaves out, without compiling a graph for them."""
    import qlora_fx

    model = tiny_llama(1)
    qmodel = qlora_fx.transform(
        copy.deepcopy(model), LoraConfig(**LORA), backend="aot_eager", compute_dtype="float32"
    )
    assert compare(model, qmodel, batch()).passed

    def compiled() -> list[int]:
        bodies = [m for p in qmodel.programs for m in p.run.children()]  # type: ignore[attr-defined]
        assert all(isinstance(body, CompiledBody) for body in bodies)
        return [len(body.compiled) for body in bodies]

    before, graphs = compiled(), len(qmodel.graph_modules)
    qmodel(**batch(), return_logits=True)
    assert sum(compiled()) > sum(before)
    assert len(qmodel.graph_modules) == graphs == 2
