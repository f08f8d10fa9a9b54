"""Experts are quantized one by one and adapted, routers stay dense, in every form transformers runs them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import qlora_fx
import pytest
import torch
from peft import LoraConfig
from qlora_fx.passes.graph.nodes import ops
from qlora_fx.testing.check import check, compare, randomize_adapter, relative_error
from small_models import batch
from torch import fx, nn
from transformers import MixtralConfig, MixtralForCausalLM

LORA: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}
EXPERTS = "model.layers.0.mlp.experts"


def tiny_mixtral(implementation: str = "grouped_mm", **changes: Any) -> MixtralForCausalLM:
    """Experts of 80 x 48 and 48 x 40."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
    }
    model = MixtralForCausalLM(MixtralConfig(**(settings | changes)))
    model.set_experts_implementation(implementation)
    return model


def transformed(model: nn.Module, lora: LoraConfig | None = None, **options: Any) -> Any:
    settings = {"backend": "eager", "compute_dtype": torch.float32} | options
    return qlora_fx.transform(model, lora or LoraConfig(**LORA), **settings)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_every_form_of_experts_is_found_and_right(implementation: str) -> None:
    model = tiny_mixtral(implementation)
    qmodel = transformed(copy.deepcopy(model))
    randomize_adapter(qmodel)
    report = compare(model, qmodel, batch())
    assert report.passed, str(report)
    assert {f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"} <= {s.name for s in report.sites}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_experts_are_right_when_compiled(backend: str) -> None:
    report = check(tiny_mixtral(), batch(), LoraConfig(**LORA), backend=backend, quiet=True)
    assert report.passed, str(report)
    norms = {line.name: line.norm for line in report.sites}
    assert norms[f"{EXPERTS}.down_proj"] > 0


@pytest.mark.slow
def test_experts_in_bfloat16_are_right() -> None:
    report = check(
        tiny_mixtral(),
        batch(),
        LoraConfig(**LORA),
        compute_dtype=torch.bfloat16,
        backend="aot_eager",
        quiet=True,
    )
    assert report.passed, str(report)


def test_no_expert_is_left_in_sixteen_bits_and_the_router_says_why() -> None:
    qmodel = transformed(tiny_mixtral().to(torch.bfloat16))
    rows = {row.name: row for row in qmodel.explain()}
    for leaf, shape in (("gate_up_proj", (4, 80, 48)), ("down_proj", (4, 48, 40))):
        row = rows[f"{EXPERTS}.{leaf}"]
        assert (row.shape, row.quantized, row.adapted, row.reason) == (shape, True, True, "")
        assert row.bytes_after < row.bytes_before / 3.5
    router = rows["model.layers.0.mlp.gate"]
    assert not router.quantized
    assert router.reason == "router stays dense; not adapted: 'all-linear' leaves routers out"
    dense = [
        t
        for t in qmodel.state_dict().values()
        if t.dim() >= 2 and t.numel() >= 40 * 48 and t.is_floating_point()
    ]
    assert {tuple(t.shape) for t in dense} == {(101, 48)}, "embedding and head only"


def test_routers_are_quantized_and_adapted_where_asked_for() -> None:
    lora = LoraConfig(r=2, target_modules=["gate", "q_proj"])
    qmodel = transformed(tiny_mixtral(), lora, also_quantize=["routers"])
    row = next(r for r in qmodel.explain() if r.name == "model.layers.0.mlp.gate")
    assert (row.quantized, row.adapted) == (True, True)


def test_only_target_parameters_are_adapted() -> None:
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    qmodel = transformed(tiny_mixtral(), lora)
    assert {r.name for r in qmodel.explain() if r.adapted} == {
        f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)
    }
    assert {tuple(p.shape) for _, p in qmodel.adapter_parameters()} == {(8, 40), (48, 8)}


def test_gradients_of_experts_that_got_no_token_are_zero_and_others_are_not() -> None:
    model = tiny_mixtral()
    with torch.no_grad():
        for (
            layer
        ) in model.model.layers:  # logits that depend on nothing: experts 1 and 3 always win
            layer.mlp.gate.forward = fixed_choice(layer.mlp.gate)
    qmodel = transformed(copy.deepcopy(model))
    randomize_adapter(qmodel)
    qmodel(**batch()).loss.backward()
    grads = {n: p.grad for n, p in qmodel.adapter_parameters()}
    a = grads[f"{EXPERTS}.lora_A.down_proj"].reshape(4, 2, 40)
    b = grads[f"{EXPERTS}.lora_B.down_proj"].reshape(48, 2, 4)
    for expert, hit in enumerate((False, True, False, True)):
        assert bool(a[expert].any()) is hit
        assert bool(b[:, :, expert].any()) is hit


def fixed_choice(gate: Any) -> Any:
    original = type(gate).forward

    def forward(hidden_states: torch.Tensor) -> Any:
        logits, weights, chosen = original(gate, hidden_states)
        winners = torch.tensor([1, 3]).expand_as(chosen)
        return logits, torch.full_like(weights, 0.5), winners

    return forward


@pytest.mark.slow
def test_dropout_acts_on_experts_in_training_only() -> None:
    lora = LoraConfig(**LORA, lora_dropout=0.5)
    qmodel = transformed(tiny_mixtral(), lora)
    randomize_adapter(qmodel, scale=0.3)
    with torch.no_grad():
        for name, p in qmodel.adapter_parameters():
            if "experts" not in name:
                p.zero_()
        trained = [qmodel.train()(**batch(), return_logits=True).logits for _ in range(2)]
        evaluated = [qmodel.eval()(**batch(), return_logits=True).logits for _ in range(2)]
    assert relative_error(trained[0], trained[1]) > 1e-4
    assert torch.equal(evaluated[0], evaluated[1])


def test_a_zero_b_leaves_the_experts_unchanged() -> None:
    qmodel = transformed(tiny_mixtral())
    with torch.no_grad():
        adapted = qmodel(**batch(), return_logits=True).logits
        with qmodel.disable_adapter():
            assert torch.equal(adapted, qmodel(**batch(), return_logits=True).logits)


def test_no_stack_is_dense_in_the_graph() -> None:
    qmodel = transformed(tiny_mixtral())
    graphs = [qmodel.graph_module, *(m for m in qmodel.graph_module.children())]
    products = 0
    for gm in graphs:
        assert isinstance(gm, fx.GraphModule)
        for node in gm.graph.nodes:
            products += node.target is ops.grouped_linear_4bit.default
            value = node.meta.get("val")
            if (
                isinstance(value, torch.Tensor)
                and value.dim() == 3
                and "trainable" not in node.meta
            ):
                shape = tuple(map(str, value.shape))
                assert shape not in {("4", "80", "48"), ("4", "48", "40"), ("4", "48", "80")}, node
    assert products == 2  # one body, called twice


def test_state_dict_of_experts_goes_round(tmp_path: Any) -> None:
    qmodel, other = transformed(tiny_mixtral()), transformed(tiny_mixtral(hidden_act="gelu"))
    state = qmodel.state_dict()
    experts = f"base_model.model.{EXPERTS}.base_layer.base_layer"  # two adapted parameters, as PEFT wraps them
    assert f"{experts}.down_proj.absmax" in state
    with torch.no_grad():
        for value in other.state_dict().values():
            if value.dtype is torch.uint8 and value.dim() > 1:
                value.zero_()
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_saving_experts_with_dropout_says_what_peft_refuses(tmp_path: Any) -> None:
    qmodel = transformed(tiny_mixtral(), LoraConfig(**LORA, lora_dropout=0.1))
    with pytest.warns(UserWarning, match="PEFT refuses dropout on target_parameters"):
        qmodel.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformed(tiny_mixtral(), LoraConfig(**LORA)).save_pretrained(tmp_path)
