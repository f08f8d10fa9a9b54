"""Whole models on a GPU, through the defaults, beside float64 and beside PEFT + bitsandbytes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from conftest import batch, tiny_llama
from default_path import STEPS, walk
from families import FAMILIES
from oracle import random_adapter, reference
from peft import LoraConfig
from qlora_fx.testing import check, compare, randomize_adapter, relative_error
from test_default_path import NO_CHECKPOINT, NO_PEFT, REFUSED, SAID, TWELVE

CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")


def on_gpu(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.cuda() for k, v in values.items()}


def left_padded(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """The second row begins with 4 masked positions."""
    values = batch(rows, tokens, padded=0)
    values["attention_mask"][1, :4] = 0
    values["labels"][1, :5] = -100  # the first label would be the masked positions' to tell
    return values


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("tokens", [16, 21, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_right(dtype: torch.dtype, tokens: int, padding: str) -> None:
    model = tiny_llama(2).cuda().to(dtype)
    values = left_padded(3, tokens) if padding == "left" else batch(3, tokens, padded=4)
    if padding == "none":
        values = {k: v for k, v in batch(3, tokens, padded=0).items() if k != "attention_mask"}
    report = check(model, on_gpu(values), CONFIG, compute_dtype=dtype, quiet=True)
    assert report.passed, report
    assert all(line.norm > 0 for line in report.sites)


def test_the_defaults_are_16_bits_where_the_model_is() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        qmodel = qlora_fx.transform(tiny_llama(1).cuda().to(dtype), CONFIG)
        assert qmodel.compute_dtype == torch.bfloat16
        wide = [
            n.name
            for n in qmodel.graph_module.graph.nodes
            if "skip" not in n.name
            and n.target is torch.ops.aten.linear.default
            and n.meta["val"].dtype == torch.float32
        ]
        assert not wide


def test_one_program_for_every_shape() -> None:
    qmodel = qlora_fx.transform(tiny_llama(2).cuda(), CONFIG)
    for rows, tokens in ((2, 16), (1, 21), (3, 64), (1, 1)):
        qmodel(**on_gpu(batch(rows, tokens, padded=0))).loss.backward()
    assert {body.compilations for body in bodies(qmodel)} == {1}


def bodies(qmodel: Any) -> list[Any]:
    programs = list(qmodel.programs)
    return [b for p in programs for _, b in p.run.named_children() if hasattr(b, "compilations")]


def test_beside_peft_and_bitsandbytes() -> None:
    """The same storage and adapter in bfloat16: as near to each other as both are to themselves in float32."""
    model = tiny_llama(2, hidden_size=64, intermediate_size=192, head_dim=32).cuda().bfloat16()
    adapter = {k: v.cuda() for k, v in random_adapter(model, 8, scale=0.1).items()}
    peft, named = reference(model, adapter, CONFIG, compute_dtype=torch.bfloat16)
    qmodel = qlora_fx.transform(copy.deepcopy(model), CONFIG, compute_dtype=torch.bfloat16)
    qmodel.load_adapter_state_dict(adapter)
    values = on_gpu(batch(3, 40))
    ours, theirs = qmodel(**values), peft(**values)
    ours.loss.backward()
    theirs.loss.backward()
    assert relative_error(ours.loss, theirs.loss) < 5e-3
    mine = {f"base_model.model.{n}": p for n, p in qmodel.adapter_parameters()}
    for name, parameter in named.items():
        assert mine[name].grad is not None
        assert relative_error(mine[name].grad, parameter.grad) < 0.1, name


def test_recomputed_blocks_give_the_same_gradients_with_dropout() -> None:
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.3, target_modules="all-linear")
    qmodel = qlora_fx.transform(tiny_llama(3).cuda(), config, compute_dtype=torch.float32)
    randomize_adapter(qmodel)
    values = on_gpu(batch())
    found = []
    for budget in (1.0, 0.0):
        qmodel.memory_budget = budget
        torch.manual_seed(3)
        qmodel(**values).loss.backward()
        found.append([p.grad.clone() for _, p in qmodel.adapter_parameters()])
        qmodel.zero_grad()
    for whole, anew in zip(*found, strict=True):
        assert relative_error(anew, whole) < 1e-5


def test_a_step_waits_for_the_device_twice_at_most() -> None:
    """To see whether the mask is causal, and which rows have labels."""
    qmodel = qlora_fx.transform(tiny_llama(2).cuda(), CONFIG)
    values = on_gpu(batch())
    qmodel(**values).loss.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            qmodel(**values).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [str(w.message) for w in caught if "synchroniz" in str(w.message)]
    assert len(said) <= 2, said


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit", "PagedLion32bit"])
def test_optimizer_state_is_paged_also_after_a_resume(name: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    qmodel = qlora_fx.transform(tiny_llama(2, **sizes).cuda(), CONFIG)
    values = on_gpu(batch())

    def train(optimizer: Any, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            qmodel(**values).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for _, p in qmodel.adapter_parameters()]

    first = qmodel.paged_optimizer(name, lr=1e-3)
    train(first, 2)
    state = copy.deepcopy(first.state_dict())
    before = [p.detach().clone() for _, p in qmodel.adapter_parameters()]
    straight = train(first, 2)
    assert not torch.equal(straight[0], before[0])
    with torch.no_grad():
        for (_, p), value in zip(qmodel.adapter_parameters(), before, strict=True):
            p.copy_(value)
    second = qmodel.paged_optimizer(name, lr=1e-3)
    second.load_state_dict(state)
    resumed = train(second, 2)
    for a, b in zip(straight, resumed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # kernels add up in any order
    for optimizer in (first, second):
        large = [
            s["state1"]
            for s in optimizer.state.values()
            if s["state1"].untyped_storage().nbytes() > 1 << 18
        ]
        assert large
        assert all(
            getattr(t, "is_paged", False) or getattr(t._base, "is_paged", False) for t in large
        )


def test_from_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama(2)
    model.save_pretrained(tmp_path)
    qmodel = qlora_fx.from_pretrained(tmp_path, CONFIG, compute_dtype=torch.float32, progress=False)
    assert qmodel.device.type == "cuda"
    randomize_adapter(qmodel)
    report = compare(model.cuda(), qmodel, on_gpu(batch()))
    assert report.passed, report


def test_generates() -> None:
    qmodel = qlora_fx.transform(tiny_llama(1).cuda(), CONFIG).eval()
    ids = batch(2, 5, padded=0)["input_ids"].cuda()
    assert qmodel.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (2, 9)


def test_a_call_on_the_wrong_device_is_told() -> None:
    qmodel = qlora_fx.transform(tiny_llama(1).cuda(), CONFIG)
    with pytest.raises(qlora_fx.InputError, match=r"input_ids is on cpu, the model on cuda:0"):
        qmodel(**batch())


BY_TYPE = {f.model_type: f for f in FAMILIES if f.model_type not in REFUSED}


@pytest.mark.parametrize("model_type", [*TWELVE, "mixtral", "qwen3_moe"])
def test_the_default_path_of(model_type: str) -> None:
    follow(model_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model_type", [t for t in BY_TYPE if t not in (*TWELVE, "mixtral", "qwen3_moe")]
)
def test_the_default_path_of_another(model_type: str) -> None:
    follow(model_type)


def follow(model_type: str) -> None:
    left_out = {"peft"} if model_type in NO_PEFT else set()
    left_out |= {"checkpoint"} if model_type in NO_CHECKPOINT else set()
    steps = tuple(s for s in STEPS if s not in left_out)
    result = walk(BY_TYPE[model_type], steps=steps, device="cuda")
    assert not result.error, result.error
    allowed = ("capturing", *SAID.get(model_type, ()))
    said = [m for found in result.said.values() for m in found]
    assert not [m for m in said if not any(words in m for words in allowed)]
    print(model_type, result.seconds)
