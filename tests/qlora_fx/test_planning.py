"""plan: memory by kind from the config alone, as it is then allocated, and settings that fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from peft import LoraConfig
from qlora_fx.compiler.request import Request
from qlora_fx.errors import CheckpointError, ConfigError
from qlora_fx.memory import plan as planning
from qlora_fx.memory.estimate import Draft, draft
from qlora_fx.memory.fit import lower_rank, search
from qlora_fx.memory.resident import state_bytes
from small_models import batch, tiny_llama
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}


def config(layers: int = 3, **changes: Any) -> LlamaConfig:
    settings = {"vocab_size": 900, "num_key_value_heads": 2, "head_dim": 32, **SIZES}
    return LlamaConfig(num_hidden_layers=layers, **(settings | changes))


def trained(cfg: LlamaConfig, plan: Any, backend: str = "inductor") -> Any:
    """A model after two steps with the plan's settings, its optimizer, and one more step to run."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(cfg, dtype=torch.bfloat16)
    s = plan.settings
    lora = LoraConfig(r=s["r"], lora_alpha=8, target_modules="all-linear")
    options = {"compute_dtype": "bfloat16", "memory_budget": s["memory_budget"], "backend": backend}
    qmodel = qlora_fx.transform(model, lora, **options)
    optimizer = qmodel.paged_optimizer(lr=1e-4, optimizer=s["optimizer"])
    ids = torch.randint(0, cfg.vocab_size, (s["batch_size"], s["sequence_length"]))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def step() -> None:
        optimizer.zero_grad()
        qmodel(**inputs).loss.backward()
        optimizer.step()

    step()
    step()
    return qmodel, optimizer, step


def held(tensors: Any) -> int:
    memory = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(memory.values())


def most_allocated(step: Any) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    kineto: Any = recorded.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_the_plan_is_what_a_step_allocates(budget: float) -> None:
    """Everything held exactly, kind by kind; the peak within 5 %."""
    cfg = config(12, hidden_size=256, intermediate_size=704, vocab_size=4000)
    plan = qlora_fx.plan(
        cfg,
        LoraConfig(**LORA),
        batch_size=2,
        sequence_length=64,
        memory_budget=budget,
        device="cpu",
    )
    qmodel, optimizer, step = trained(cfg, plan)
    store = dict(qmodel.base.store.items())
    lora = dict(qmodel.adapter_parameters())
    states = [
        t for s in optimizer.state.values() for k, t in s.items() if k in ("state1", "state2")
    ]
    quantized = [r for r in qlora_fx.explain(qmodel) if r.quantized]
    assert plan.storage == sum(r.bytes_after for r in quantized)
    assert plan.adapters == held(lora.values())
    assert plan.gradients == held([p.grad for p in lora.values()])
    assert plan.optimizer == held(states)
    constants = held(store.values()) - plan.storage - plan.adapters
    assert plan.constants == constants
    real = held(store.values()) + plan.gradients + plan.optimizer + most_allocated(step)
    assert plan.peak == pytest.approx(real, rel=0.05)
    assert plan.peak == plan.footprint.total + plan.activations + plan.workspace
    told = qlora_fx.saved_activations(qmodel, batch_size=2, sequence_length=64)
    assert plan.split.bytes == told.total


@pytest.mark.slow
def test_a_plan_reads_no_weight_and_takes_no_memory_for_one(monkeypatch: Any) -> None:
    """Seventy billion parameters: planned within this process."""
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64}
    cfg = config(2, num_key_value_heads=8, head_dim=128, vocab_size=32000, **wide)
    plan = qlora_fx.plan(cfg, LoraConfig(r=16, target_modules="all-linear"))
    per_layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    assert plan.footprint.weights == 2 * per_layer
    assert 8 * plan.storage / plan.footprint.weights == pytest.approx(4.127, abs=1e-3)
    # r (in + out) of q, k, v, o, gate, up, down
    sums = 2 * 16384 + 2 * 9216 + 3 * 36864
    assert plan.footprint.trained == 2 * 16 * sums
    assert plan.methods()["full"] > plan.methods()["lora"] > plan.methods()["qlora"] == plan.peak


@pytest.mark.slow
def test_the_timeline_names_the_place_of_the_peak() -> None:
    plan = qlora_fx.plan(config(), LoraConfig(**LORA), batch_size=2, sequence_length=64)
    places = [moment.place for moment in plan.timeline]
    layers = [f"model.layers.{i}" for i in range(3)]
    assert [p for p in places if "layers" in p] == [
        *(f"forward {name}" for name in layers),
        *(f"backward {name}" for name in layers[::-1]),
    ]
    assert places[-1] == "optimizer"
    waiting = [m.held for m in plan.timeline if m.place.startswith("forward model")]
    assert waiting == sorted(waiting)
    assert waiting[-1] > waiting[0]
    assert plan.highest.place in str(plan)
    for line in ("storage", "activations", "weights at 4.1", "fits 8 GB", "everything kept"):
        assert line in str(plan)


@pytest.mark.slow
def test_the_plan_draws_itself(tmp_path: Path) -> None:
    plan = qlora_fx.plan(config(), LoraConfig(**LORA))
    plan.plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_fit_gives_up_what_costs_least_first() -> None:
    lora = LoraConfig(**(LORA | {"r": 16}))
    asked: dict[str, Any] = {"batch_size": 8, "sequence_length": 256, "memory_budget": 1.0}
    asked["optimizer"] = "PagedAdamW32bit"
    whole = qlora_fx.plan(config(), lora, **asked)
    same = qlora_fx.plan(config(), lora, fit=whole.peak, **asked)
    assert (same.peak, same.changed) == (whole.peak, [])
    traced = drafted(lora)  # once
    least = traced.plan(**(asked | {"memory_budget": 0.0}))
    assert least.peak < whole.peak
    some = search(traced, asked, (whole.peak + least.peak) // 2, drafted)
    assert 0 < some.settings["memory_budget"] < 1
    assert some.settings["batch_size"] == 8, "the batch is not touched while less kept is enough"
    assert some.peak <= some.limit
    small = search(traced, asked, least.peak // 2, drafted)
    assert small.settings["batch_size"] < 8
    assert small.settings["optimizer"] == "PagedAdamW8bit", "which costs less speed"
    assert small.peak <= small.limit
    assert "batch_size=" in str(small)
    tiny = asked | {"batch_size": 1, "sequence_length": 128}
    bare = traced.plan(**(tiny | {"memory_budget": 0.0, "optimizer": "PagedAdamW8bit"}))
    low = search(traced, tiny, bare.peak - 1, drafted)
    assert low.settings["r"] < 16
    with pytest.raises(ConfigError, match=r"does not fit 0\.0001 GB: with .* it takes"):
        search(traced, tiny, 100_000, drafted)


def drafted(lora: LoraConfig) -> Draft:
    request = Request.check(lora, compute_dtype="bfloat16", backend="aot_eager")
    model = planning.model_of(config(), torch.bfloat16, None, None, None)
    return draft(model, request, on_gpu=True)


@pytest.mark.slow
def test_a_folder_with_a_config_alone_is_enough(tmp_path: Path) -> None:
    config(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    one = qlora_fx.plan(tmp_path, LoraConfig(**LORA))
    other = qlora_fx.plan(config(), LoraConfig(**LORA))
    assert one.peak == other.peak
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "nothing"}))
    with pytest.raises(CheckpointError, match="no config that transformers reads"):
        qlora_fx.plan(tmp_path)
    with pytest.raises(CheckpointError, match="not there"):
        qlora_fx.plan(tmp_path / "gone")


@pytest.mark.slow
def test_a_model_with_weights_can_be_planned_and_is_left_alone() -> None:
    model = tiny_llama(2)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plan = qlora_fx.plan(model, LoraConfig(**LORA), compute_dtype="float32")
    assert plan.settings["dtype"] == "float32"
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model(**batch())


@pytest.mark.slow
def test_a_plan_does_not_depend_on_the_mode_it_is_made_in() -> None:
    usual = qlora_fx.plan(config(), LoraConfig(**LORA))
    with torch.no_grad():
        assert qlora_fx.plan(config(), LoraConfig(**LORA)).peak == usual.peak
    assert usual.activations > 0


@pytest.mark.slow
def test_an_encoder_decoder_is_planned_with_two_lengths() -> None:
    from transformers import T5Config

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 200}
    names = {"architectures": ["T5ForConditionalGeneration"], "decoder_start_token_id": 0}
    cfg = T5Config(num_layers=2, **sizes, **names)
    one = qlora_fx.plan(cfg, LoraConfig(**LORA), sequence_length=64)
    two = qlora_fx.plan(cfg, LoraConfig(**LORA), sequence_length=128)
    assert two.split.bytes > 1.9 * one.split.bytes


@pytest.mark.slow
def test_on_a_gpu_a_stack_of_experts_is_dense_at_a_time() -> None:
    """Seen on one: six layers of 128 experts took 0.8 GB more than a CPU, which has one expert dense."""
    cfg = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
    )
    asked = Request.check(LoraConfig(**LORA), compute_dtype="bfloat16", backend="aot_eager")
    drafted = draft(planning.model_of(cfg, torch.bfloat16, None, None, None), asked, on_gpu=True)
    step: dict[str, Any] = {"batch_size": 1, "sequence_length": 8, "memory_budget": 1.0}
    gpu, cpu = (
        replace(drafted, on_gpu=on_gpu).plan(**step, optimizer="PagedAdamW32bit")
        for on_gpu in (True, False)
    )
    assert gpu.footprint == cpu.footprint
    more = gpu.timeline[1].working - cpu.timeline[1].working
    weights = 16 * 2 * 128 * 64  # gate and up of each
    stack, one = 2 * weights + 4 * weights // 64, 2 * weights // 16
    assert more == pytest.approx(stack - one, rel=0.03)


def test_a_lower_rank_keeps_the_scaling() -> None:
    lower = lower_rank(LoraConfig(r=12, lora_alpha=6, rank_pattern={"q_proj": 32, "k_proj": 4}))
    assert (lower.r, lower.lora_alpha) == (8, 4)
    assert lower.rank_pattern == {"q_proj": 21, "k_proj": 4}
    stable = lower_rank(LoraConfig(r=16, lora_alpha=4, use_rslora=True))
    assert stable.lora_alpha / 8**0.5 == pytest.approx(4 / 16**0.5)


@pytest.mark.slow
def test_storage_settings_are_planned_as_they_are_stored() -> None:
    single = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    plan = qlora_fx.plan(config(), LoraConfig(**LORA), single, compute_dtype="bfloat16")
    assert 8 * plan.storage / plan.footprint.weights == pytest.approx(4.5, abs=1e-2)
    head = qlora_fx.plan(config(), LoraConfig(**LORA), also_quantize=["head"])
    assert head.constants < qlora_fx.plan(config(), LoraConfig(**LORA)).constants


def test_optimizer_state_by_its_rules() -> None:
    assert state_bytes("PagedAdamW32bit", [1000, 24]) == 8 * (1024 + 256)
    assert state_bytes("PagedLion32bit", [1024]) == 4096
    assert state_bytes("PagedAdEMAMix", [1024]) == 3 * 4096
    assert state_bytes("PagedAdamW8bit", [5120, 100]) == 2 * (5120 + 4 * 20 + 400) + 2 * 1024
    with pytest.raises(ConfigError, match=r"optimizer='SGD'; accepted: Paged"):
        qlora_fx.plan(config(), optimizer="SGD")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 0}, r"batch_size=0; accepted: an integer"),
        ({"sequence_length": "512"}, r"sequence_length='512'; accepted"),
        ({"fit": "big"}, r"fit='big'; accepted: bytes"),
        ({"device": "tpu"}, r"device='tpu'; accepted: 'cuda', 'cpu'"),
        ({"fit": 0.5}, r"fit=0.5; accepted: bytes"),
        ({"memory_budget": 2.0}, r"memory_budget=2.0; accepted"),
        ({"memory_budget": None}, r"memory_budget=None is what is free.*accepted: bytes"),
    ],
)
def test_what_is_wrong_is_quoted(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        qlora_fx.plan(config(), **wrong)
    with pytest.raises(ConfigError, match=r"source=3; accepted: a folder, a hub id"):
        qlora_fx.plan(3)
