"""Bad input: a clear error of the right kind that quotes what was given, and the user's model still works."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import CaptureError, ConfigError, GraphError, InputError, ModelError
from conftest import Toy, batch, tiny_llama
from peft import LoraConfig, get_peft_model
from qlora_fx.compiler.request import (
    CARRIED,
    HONOURED,
    check_compute_dtype,
    check_lora,
    check_quantization,
)
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM


def nan_in_a_weight() -> nn.Module:
    model = tiny_llama(1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, :5] = float("nan")
    return model


def infinity_in_a_weight() -> nn.Module:
    model = tiny_llama(1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_llama(1).config)


def quantized_already() -> nn.Module:
    import bitsandbytes as bnb

    model = tiny_llama(1)
    layer = bnb.nn.Linear4bit(48, 80)
    model.model.layers[0].mlp.up_proj = layer.to("cpu")
    return model


def with_peft() -> Any:
    return get_peft_model(tiny_llama(1), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            nan_in_a_weight,
            ModelError,
            r"up_proj.weight \[80, 48\] has 5 values that are NaN or infinite",
        ),
        (
            infinity_in_a_weight,
            ModelError,
            "lm_head.weight .* has 1 values that are NaN or infinite",
        ),
        (
            on_meta,
            ModelError,
            "is on the meta device and has no values; load the model with from_pretrained",
        ),
        (
            quantized_already,
            ModelError,
            "up_proj.weight is already quantized.*without quantization_config",
        ),
        (with_peft, ModelError, "already has PEFT adapters; pass the base model"),
        (lambda: "gpt2", ModelError, "model is a str; accepted: a transformers model"),
        (lambda: nn.Linear(2, 2), ModelError, "model is a Linear; accepted: a transformers model"),
        (Toy, InputError, "pass example_inputs="),
    ],
)
def test_models_that_cannot_be_transformed(
    make: Callable[[], Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        qlora_fx.transform(make())


class DataDependent(LlamaForCausalLM):
    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **kwargs: Any
    ) -> Any:
        if input_ids.sum() > 0:  # the line that stops the capture
            input_ids = input_ids + 0
        return super().forward(input_ids, attention_mask, labels=labels, **kwargs)


def unchanged(model: Any, before: dict[str, torch.Tensor], loss: float) -> None:
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert float(model(**batch(), use_cache=False).loss.detach()) == loss


def test_data_dependent_python_names_its_line_and_leaves_the_model_usable() -> None:
    model = DataDependent(LlamaConfig(**tiny_llama(1).config.to_dict()))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = float(model(**batch(), use_cache=False).loss.detach())
    with pytest.raises(CaptureError) as caught:
        qlora_fx.transform(model)
    message = str(caught.value)
    assert "test_bad_input.py" in message
    assert "if input_ids.sum() > 0:" in message
    assert "torch.where" in message
    unchanged(model, before, loss)


@pytest.mark.parametrize("stage", ["normalize", "select", "quantize", "adapt", "outline"])
def test_a_pass_that_fails_leaves_the_model_usable(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlora_fx.compiler import pipeline

    def broken(gm: Any, *, config: Any) -> Any:
        raise GraphError("planted")

    broken.__name__ = stage
    stages = tuple(pipeline.Stage(broken) if s.name == stage else s for s in pipeline.PIPELINE)
    run = pipeline.run
    monkeypatch.setattr(
        pipeline, "run", lambda gm, config, **kw: run(gm, config, **kw, stages=stages)
    )
    model = tiny_llama(1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = float(model(**batch(), use_cache=False).loss.detach())
    with pytest.raises(GraphError, match="planted"):
        qlora_fx.transform(model)
    unchanged(model, before, loss)


OTHER_VALUES: dict[str, Any] = {
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "use_dora": True,
    "alora_invocation_tokens": [1],
    "use_qalora": True,
    "layer_replication": [(0, 1)],
    "lora_bias": True,
    "target_parameters": ["a.b"],
    "ensure_weight_tying": True,
}


@pytest.mark.parametrize("name", [f.name for f in fields(LoraConfig)])
def test_every_lora_field_is_honoured_carried_or_refused(name: str) -> None:
    """A field that a new PEFT adds fails here until somebody decides about it."""
    config = LoraConfig(target_modules=["q_proj"])
    if name in HONOURED | CARRIED:
        check_lora(config)
        return
    setattr(config, name, OTHER_VALUES.get(name, object()))
    with pytest.raises(
        ConfigError, match=rf"LoraConfig\.{name}=.* is not supported; accepted: .*Supported fields"
    ):
        check_lora(config)


@pytest.mark.parametrize("value", ["pissa", "olora", "eva", "orthogonal", "loftq"])
def test_other_initializations_are_refused(value: str) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    config.init_lora_weights = value
    with pytest.raises(
        ConfigError, match=f"init_lora_weights='{value}'.*accepted: True, False, 'gaussian'"
    ):
        check_lora(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, r"LoraConfig.r=0; accepted: an integer of at least 1"),
        ({"r": 1.5}, r"LoraConfig.r=1.5; accepted: an integer"),
        ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\['q_proj'\]=-1"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0; accepted: 0 <= p < 1"),
        ({"lora_dropout": -0.1}, r"lora_dropout=-0.1"),
    ],
)
def test_lora_values_out_of_range(change: dict[str, Any], message: str) -> None:
    config = LoraConfig(target_modules=["q_proj"])
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        check_lora(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "load_in_4bit=False, load_in_8bit=False; accepted: load_in_4bit=True"),
        ({"load_in_8bit": True}, "load_in_8bit=True; accepted: load_in_4bit=True"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
            "bnb_4bit_quant_type='int4'; accepted: 'nf4', 'fp4'",
        ),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.float64},
            "bnb_4bit_quant_storage=torch.float64",
        ),
        (
            {"load_in_4bit": True, "llm_int8_threshold": 1.0},
            "llm_int8_threshold=1.0 has no meaning in 4 bits",
        ),
    ],
)
def test_quantization_configs_that_cannot_be_honoured(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_quantization(BitsAndBytesConfig(**settings), 64)


def test_other_arguments_of_transform() -> None:
    model = tiny_llama(1)
    for options, message in [
        ({"lora": {"r": 8}}, "is a dict; accepted: a peft.LoraConfig"),
        ({"quantization": "nf4"}, "is a str; accepted: a transformers.BitsAndBytesConfig"),
        (
            {
                "quantization": BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_storage=torch.float32
                ),
                "model": tiny_llama(1, hidden_size=12, intermediate_size=5, head_dim=2),
                "lora": LoraConfig(r=1, target_modules=["up_proj"]),
            },
            r"packed bytes of model.layers.0.mlp.gate_proj \[5, 12\] do not divide into torch.float32",
        ),
        ({"blocksize": 60}, "blocksize=60; accepted: 32, 64"),
        ({"compute_dtype": "int8"}, "compute_dtype=torch.int8; accepted: 'auto', torch.float32"),
        ({"compute_dtype": "fast"}, "compute_dtype='fast'; accepted: 'auto'"),
        ({"backend": "tensorrt"}, "backend='tensorrt'; accepted: inductor, aot_eager, eager"),
        ({"lora": LoraConfig(target_modules=["q_prj"])}, "q_prj.*Near names: .*q_proj"),
        ({"lora": LoraConfig(r=64, target_modules=["k_proj"])}, "r=64 is larger.*k_proj"),
    ]:
        with pytest.raises(ConfigError, match=message):
            qlora_fx.transform(**({"model": model} | options))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="'nonsense'; the model takes: input_ids"):
        qlora_fx.transform(Toy2(), example_inputs={"input_ids": torch.ones(2, 2), "nonsense": 1})
    assert check_compute_dtype("auto") == "auto"


class Toy2(Toy):
    def forward(self, input_ids: torch.Tensor) -> Any:
        return super().forward(input_ids)


def test_gaussian_and_random_initialization() -> None:
    torch.manual_seed(0)
    r = 16
    for init, a_std, b_is_zero in (
        (True, None, True),
        ("gaussian", 1 / r, True),
        (False, None, False),
    ):
        config = LoraConfig(r=r, target_modules=["q_proj"], init_lora_weights=init)  # type: ignore[arg-type]
        qmodel = qlora_fx.transform(tiny_llama(1), config, backend="eager")
        named = dict(qmodel.adapter_parameters())
        a, b = (named[f"model.layers.0.self_attn.q_proj.lora_{x}.weight"] for x in "AB")
        assert bool((b == 0).all()) == b_is_zero
        if a_std:
            assert float(a.detach().std()) == pytest.approx(a_std, rel=0.15)
        else:
            assert (
                float(a.detach().abs().max()) <= (1 / 48) ** 0.5
            )  # Kaiming-uniform with a = sqrt(5)
