"""Bad input: a clear error of the right kind that quotes what was given, and the user's model still works."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import CaptureError, ConfigError, GraphError, InputError, ModelError
from peft import LoraConfig, get_peft_model
from qlora_fx.capture.positions import longest_rows
from qlora_fx.compiler.check_lora import CARRIED, HONOURED, check_lora
from qlora_fx.compiler.request import Request, check_compute_dtype, check_quantization
from qlora_fx.units import parse_size
from small_models import Toy, batch, tiny_gpt2, tiny_llama
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)


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


# -- the doors ----------------------------------------------------------------------------------------


def test_all_doors_take_the_same_arguments_with_the_same_defaults() -> None:
    """What differs on purpose: a plan is for bfloat16 and keeps everything, a check computes in float32."""
    asked = inspect.signature(Request.check).parameters
    others: dict[Any, dict[str, Any]] = {
        qlora_fx.transform: {},
        qlora_fx.from_pretrained: {},
        qlora_fx.plan: {"compute_dtype": torch.bfloat16, "memory_budget": 1.0},
        qlora_fx.testing.check: {"compute_dtype": torch.float32},
    }
    for door, different in others.items():
        parameters = inspect.signature(door).parameters
        shared = asked.keys() & parameters.keys()
        assert {"lora", "quantization", "compute_dtype", "blocksize", "also_quantize"} <= shared
        for name in shared:
            default = different.get(name, asked[name].default)
            assert parameters[name].default == default, (door, name)
    for door in (qlora_fx.transform, qlora_fx.from_pretrained):
        assert asked.keys() <= inspect.signature(door).parameters.keys()


def test_a_budget_that_plain_autograd_cannot_keep_is_refused() -> None:
    model = tiny_llama(1)
    with pytest.raises(ConfigError, match=r"memory_budget=0.5 with backend='eager'.*aot_eager"):
        qlora_fx.transform(model, backend="eager", memory_budget=0.5)
    qmodel = qlora_fx.transform(model, backend="eager")
    with pytest.raises(ConfigError, match=r"memory_budget='1GB' with backend='eager'"):
        qmodel.memory_budget = "1GB"
    qmodel.memory_budget = None
    assert qmodel.memory_budget is None


def test_sizes_are_read_alike_everywhere(tmp_path: Path) -> None:
    for text, size in (
        ("500 MiB", 500 << 20),
        ("6GB", 6 * 10**9),
        ("1TB", 10**12),
        ("2tib", 2 << 40),
        ("1.5 kb", 1500),
        (".5 GB", 5 * 10**8),
        (123, 123),
    ):
        assert parse_size(text, "fit") == size
    for wrong in ("6", "much", "-1GB", "0GB", "", 0, -5, True, 1.5, None, [1]):
        with pytest.raises(ConfigError, match=r"fit=.*; accepted: bytes as an int or as '6GB'"):
            parse_size(wrong, "fit")
    qmodel = qlora_fx.transform(tiny_llama(1), backend="eager")
    qmodel.save_quantized(tmp_path / "4bit", max_shard_size="500 MiB")
    with pytest.raises(ConfigError, match=r"max_shard_size='big'; accepted: bytes as an int"):
        qmodel.save_quantized(tmp_path / "other", max_shard_size="big")
    with pytest.raises(ConfigError, match=r"max_shard_size='big'; accepted: bytes as an int"):
        qmodel.merge(tmp_path / "other", max_shard_size="big")
    with pytest.raises(ConfigError, match=r"memory_budget='big'; accepted: bytes as an int"):
        qlora_fx.transform(tiny_llama(1), memory_budget="big")


# -- calls --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eager() -> qlora_fx.QLoRAModel:
    return qlora_fx.transform(tiny_llama(2), backend="eager", compute_dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputids": 3}, r"unknown argument 'inputids' \(did you mean 'input_ids'\?\); .*labels"),
        ({"label": torch.ones(3, 21)}, r"unknown argument 'label' \(did you mean 'labels'\?\)"),
        ({"nonsense": 1}, r"unknown argument 'nonsense'; the model takes: input_ids, .*\*\*kwargs"),
        (
            {"input_ids": torch.zeros(0, 21, dtype=torch.int64)},
            r"input_ids is empty, with shape \[0, 21\]; accepted: at least 1",
        ),
        (
            {"input_ids": torch.zeros(3, 0, dtype=torch.int64)},
            r"input_ids is empty, with shape \[3, 0\]",
        ),
        (
            {"input_ids": torch.zeros(3, 21)},
            r"input_ids is torch.float32 of shape \[3, 21\]; accepted: token ids, int64",
        ),
        (
            {"input_ids": torch.zeros(21, dtype=torch.int64)},
            r"input_ids has shape \[21\]; accepted: \[batch, sequence\].*input_ids\[None\]",
        ),
        (
            {"output_attentions": True},
            r"output_attentions=True: LlamaForCausalLM with attn_implementation='sdpa' returns no attentions",
        ),
        ({"output_router_logits": True}, r"output_router_logits=True: .* returns no router_logits"),
    ],
)
def test_calls_that_mean_something_else_are_refused_by_name(
    eager: qlora_fx.QLoRAModel, change: dict[str, Any], message: str
) -> None:
    inputs = {"input_ids": batch()["input_ids"]}
    graphs = len(eager.graph_modules)
    with pytest.raises(InputError, match=message):
        eager(**(inputs | change))
    assert len(eager.graph_modules) == graphs


def test_what_trainers_pass_is_accepted(eager: qlora_fx.QLoRAModel) -> None:
    inputs = batch()
    loss = float(eager(**inputs).loss.detach())
    for more in (
        {"return_logits": True},
        {"use_cache": False, "return_dict": True},
        {"output_attentions": False, "output_hidden_states": False},
        {"past_key_values": None, "unknown": None},
        {"num_items_in_batch": None},
    ):
        assert float(eager(**inputs, **more).loss.detach()) == pytest.approx(loss, rel=1e-5)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    counted = eager(**inputs, num_items_in_batch=count).loss
    assert float(counted.detach()) == pytest.approx(loss, rel=1e-5)


def test_hidden_states_are_returned_where_they_are_asked_for() -> None:
    model = tiny_llama(2)
    inputs = {"input_ids": batch()["input_ids"], "output_hidden_states": True}
    qmodel = qlora_fx.transform(copy.deepcopy(model), backend="eager", compute_dtype="float32")
    with torch.no_grad():
        ours, theirs = qmodel(**inputs).hidden_states, model(**inputs).hidden_states
    assert [t.shape for t in ours] == [t.shape for t in theirs]


def test_attentions_are_returned_by_a_model_that_computes_them() -> None:
    model = tiny_llama(1, attn_implementation="eager")
    inputs = {"input_ids": batch()["input_ids"], "output_attentions": True}
    qmodel = qlora_fx.transform(copy.deepcopy(model), backend="eager", compute_dtype="float32")
    with torch.no_grad():
        ours, theirs = qmodel(**inputs).attentions, model(**inputs).attentions
    assert [t.shape for t in ours] == [t.shape for t in theirs]


def test_an_example_call_is_bound_as_any_other_call() -> None:
    """A count of items and the default ``return_dict`` in the example: the first call finds that capture."""
    example = batch() | {"num_items_in_batch": 40, "return_dict": True}
    qmodel = qlora_fx.transform(tiny_llama(1), example_inputs=example, backend="eager")
    qmodel(**batch(2, 9), num_items_in_batch=12)
    assert len(qmodel.graph_modules) == 1


def test_a_model_that_takes_no_kwargs_names_the_nearest_argument() -> None:
    with pytest.raises(
        InputError,
        match=r"unknown argument 'inputs_ids' \(did you mean 'input_ids'\?\); the model takes: input_ids$",
    ):
        qlora_fx.transform(Toy2(), example_inputs={"inputs_ids": torch.ones(2, 2)})


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())],
)
def test_a_copy_of_a_compiled_model_is_refused_with_what_to_do_instead(
    eager: qlora_fx.QLoRAModel, duplicate: Callable[[Any], Any]
) -> None:
    with pytest.raises(ModelError, match=r"cannot be copied or pickled.*save_quantized\(folder\)"):
        duplicate(eager)


def test_rows_longer_than_the_learned_positions_are_refused() -> None:
    """Compiled code on a CPU would end the process there. Rotary positions have no end."""
    qmodel = qlora_fx.transform(
        tiny_gpt2(), LoraConfig(r=2, target_modules="all-linear"), backend="eager"
    )
    assert bool(qmodel(**batch(1, 64)).loss.isfinite())
    with pytest.raises(InputError, match="input_ids has rows of 65 tokens; accepted: at most 64"):
        qmodel(**batch(1, 65))
    assert longest_rows(tiny_llama(1)) == {}


class Table(nn.Embedding):
    """OPT's and BART's: the first rows are for nobody."""

    offset = 2


@pytest.mark.parametrize(
    ("path", "table", "target", "rows"),
    [
        ("embeddings.position_embeddings", nn.Embedding(64, 8), False, {"input_ids": 64}),
        ("embeddings.position_embeddings", nn.Embedding(64, 8, 1), False, {"input_ids": 62}),
        ("decoder.embed_positions", Table(66, 8), False, {"input_ids": 64}),
        ("decoder.embed_positions", Table(66, 8), True, {"decoder_input_ids": 64}),
        ("vision.position_embedding", nn.Embedding(50, 8), False, {}),
        ("embed_tokens", nn.Embedding(64, 8), False, {}),
    ],
)
def test_how_many_positions_are_learned(
    path: str, table: nn.Module, target: bool, rows: dict[str, int]
) -> None:
    model = nn.Module()
    model.config = SimpleNamespace(max_position_embeddings=64, is_encoder_decoder=target)
    inner: nn.Module = model
    *above, last = path.split(".")
    for part in above:
        inner.add_module(part, nn.Module())
        inner = inner.get_submodule(part)
    inner.add_module(last, table)
    assert longest_rows(model) == rows
