"""Whole models on a GPU, through the defaults, beside float64 and beside PEFT + bitsandbytes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from oracle import random_adapter, reference
from peft import LoraConfig
from qlora_fx.compiler import request
from qlora_fx.runtime.fastest_dtype import fastest
from qlora_fx.testing import Oracle, compare, randomize_adapter, relative_error
from qlora_fx.testing.step import step
from qlora_fx.training import reliable
from slow import only_slow_but
from small_models import batch, tiny_llama
from test_default_path import BY_TYPE, TWELVE, check
from transformers import Trainer, TrainingArguments


def config(**changes: Any) -> LoraConfig:
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(settings | changes))  # PEFT writes into its config: a new one each time


def on_gpu(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.cuda() for k, v in values.items()}


def left_padded(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """The second row begins with 4 masked positions."""
    values = batch(rows, tokens, padded=0)
    values["attention_mask"][1, :4] = 0
    values["labels"][1, :5] = -100  # the first label would be the masked positions' to tell
    return values


SHAPES = ((3, 16), (2, 21), (3, 100), (1, 7))


def batches(padding: str) -> Iterator[dict[str, torch.Tensor]]:
    for rows, tokens in SHAPES:
        if padding == "left" and rows > 1:
            yield on_gpu(left_padded(rows, tokens))
        else:
            yield on_gpu(batch(rows, tokens, padded=4 if padding == "right" else 0))


def test_a_step_is_right_at_every_shape_and_padding() -> None:
    model = tiny_llama(2).cuda()
    qmodel = qlora_fx.transform(copy.deepcopy(model), config(), compute_dtype=torch.float32)
    randomize_adapter(qmodel)
    for padding in ("none", "right", "left"):
        for values in batches(padding):
            if padding == "none":
                del values["attention_mask"]
            report = compare(model, qmodel, values)
            assert report.passed, report
            assert all(line.norm > 0 for line in report.sites)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_in_16_bits_a_step_is_as_near_to_float64_as_the_reference_stacks(padding: str) -> None:
    """The same storage and adapter; errors of all gradients as one vector."""
    model = tiny_llama(2, hidden_size=64, intermediate_size=192, head_dim=32).cuda().bfloat16()
    adapter = {k: v.cuda() for k, v in random_adapter(model, 8, scale=0.1).items()}
    peft, named = reference(model, adapter, config(), compute_dtype=torch.bfloat16)
    qmodel = qlora_fx.transform(copy.deepcopy(model), config(), compute_dtype=torch.bfloat16)
    qmodel.load_adapter_state_dict(adapter)
    mine = dict(qmodel.adapter_parameters())
    for values in batches(padding):
        true_out, true = step(Oracle(model, qmodel.base), values)
        found = []
        for stack, parameters in (
            (peft, {n.removeprefix("base_model.model."): p for n, p in named.items()}),
            (qmodel, mine),
        ):
            stack.zero_grad()
            # As Trainer's bf16=True does it: PEFT keeps adapters in float32. Ours multiplies in bfloat16 by itself.
            with torch.autocast("cuda", torch.bfloat16):
                out = stack(**values)
            out.loss.backward()
            assert relative_error(out.loss, true_out["loss"]) < 5e-3
            errors = [(parameters[n].grad.double() - t).norm() for n, t in true.items()]
            found.append(float(torch.stack(errors).norm()))
        size = float(torch.stack([t.norm() for t in true.values()]).norm())
        theirs, ours = (error / size for error in found)
        print(
            f"{padding} {list(values['input_ids'].shape)}: ours {ours:.1e}, reference {theirs:.1e}"
        )
        assert ours < 1.5 * theirs + 1e-3


def test_the_defaults_are_16_bits_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "fastest", fastest)  # other tests decide on float32
    for dtype in (torch.bfloat16, torch.float16):
        qmodel = qlora_fx.transform(tiny_llama(1).cuda().to(dtype), config())
        assert qmodel.compute_dtype == torch.bfloat16
        linears = qmodel.graph_module.graph.find_nodes(
            op="call_function", target=torch.ops.aten.linear.default
        )
        assert {n.meta["val"].dtype for n in linears} == {torch.bfloat16}


def test_one_program_for_every_shape() -> None:
    qmodel = qlora_fx.transform(tiny_llama(2).cuda(), config())
    for rows, tokens in ((2, 16), (1, 21), (3, 64), (1, 1)):
        qmodel(**on_gpu(batch(rows, tokens, padded=0))).loss.backward()
    assert {body.compilations for body in bodies(qmodel)} == {1}


def bodies(qmodel: Any) -> list[Any]:
    programs = list(qmodel.programs)
    return [b for p in programs for _, b in p.run.named_children() if hasattr(b, "compilations")]


def test_recomputed_blocks_give_the_same_gradients_with_dropout() -> None:
    # Triton 3.6 cannot compile the dropout of rows of 48: with two warps its TritonGPURemoveLayoutConversions fails.
    model = tiny_llama(3, hidden_size=256, intermediate_size=512, head_dim=64).cuda()
    qmodel = qlora_fx.transform(model, config(lora_dropout=0.3), compute_dtype=torch.float32)
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
    qmodel = qlora_fx.transform(tiny_llama(2).cuda(), config())
    values = on_gpu(batch())
    qmodel(**values).loss.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            qmodel(**values).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [str(w.message) for w in caught if "called a synchronizing" in str(w.message)]
    assert len(said) <= 2, said


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit", "PagedLion32bit"])
def test_optimizer_state_is_paged_also_after_a_resume(name: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 128}
    qmodel = qlora_fx.transform(tiny_llama(2, **sizes).cuda(), config())
    values = on_gpu(batch())

    def train(optimizer: Any, steps: int) -> list[torch.Tensor]:
        for _ in range(steps):
            qmodel(**values).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for _, p in qmodel.adapter_parameters()]

    first = qmodel.paged_optimizer(1e-3, optimizer=name)
    train(first, 2)
    state = copy.deepcopy(first.state_dict())
    before = [p.detach().clone() for _, p in qmodel.adapter_parameters()]
    straight = train(first, 2)
    assert not torch.equal(straight[0], before[0])
    with torch.no_grad():
        for (_, p), value in zip(qmodel.adapter_parameters(), before, strict=True):
            p.copy_(value)
    second = qmodel.paged_optimizer(1e-3, optimizer=name)
    second.load_state_dict(state)
    resumed = train(second, 2)
    for a, b in zip(straight, resumed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)  # kernels add up in any order
    for optimizer in (first, second):
        for state in optimizer.state.values():
            if state["state1"].untyped_storage().nbytes() > 100_000:
                assert is_paged(state["state1"], optimizer)
        assert any(is_paged(s["state1"], optimizer) for s in optimizer.state.values())


def is_paged(state: torch.Tensor, optimizer: Any) -> bool:
    """Whether it lies in managed memory. Adapters are updated by the million: each state is a part of a run's."""
    return any(
        whole.data_ptr() <= state.data_ptr() < whole.data_ptr() + whole.nbytes
        for whole in optimizer.page_mng.paged_tensors
    )


def trainer(kind: Any, qmodel: Any, folder: Path, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "optim": "paged_adamw_8bit",
        "learning_rate": 1e-3,
        "bf16": True,
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    rows = torch.randint(2, 101, (32, 256), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(str(folder), **(settings | changes))
    return kind(model=qmodel, args=args, train_dataset=data)


def test_transformers_trainer(tmp_path: Path) -> None:
    qmodel = qlora_fx.transform(tiny_llama(2).cuda().bfloat16(), config())
    before = {n: p.detach().clone() for n, p in qmodel.adapter_parameters()}
    run = trainer(Trainer, qmodel, tmp_path)
    run.train()
    assert all(entry["grad_norm"] > 0 for entry in run.state.log_history if "grad_norm" in entry)
    moved = [n for n, p in qmodel.adapter_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == len(before)
    run.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_a_step_that_runs_out_of_memory_is_taken_again_with_half_the_budget(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 128}
    model = tiny_llama(6, **sizes).cuda().bfloat16()
    qmodel = qlora_fx.transform(model, config(), memory_budget=1.0)
    peaks = []
    ids = torch.randint(2, 101, (16, 256), device="cuda")
    for budget in (1.0, 0.0):
        qmodel.memory_budget = budget
        for _ in range(2):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            qmodel(input_ids=ids, labels=ids).loss.backward()
        peaks.append(torch.cuda.max_memory_reserved())
    qmodel.memory_budget = 1.0
    torch.cuda.empty_cache()
    run = trainer(reliable(Trainer), qmodel, tmp_path, per_device_train_batch_size=16)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((peaks[0] + peaks[1]) / 2 / total)
    try:
        with pytest.warns(UserWarning, match="ran out of memory; trying it again"):
            run.train()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert run.state.global_step == 3
    assert qmodel.memory_budget < 1.0


def test_from_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama(2)
    model.save_pretrained(tmp_path)
    qmodel = qlora_fx.from_pretrained(
        tmp_path, config(), compute_dtype=torch.float32, progress=False
    )
    assert qmodel.device.type == "cuda"
    randomize_adapter(qmodel)
    report = compare(model.cuda(), qmodel, on_gpu(batch()))
    assert report.passed, report


def test_generates() -> None:
    qmodel = qlora_fx.transform(tiny_llama(1).cuda(), config()).eval()
    randomize_adapter(qmodel)
    ids = batch(2, 5, padded=0)["input_ids"].cuda()
    expected = ids
    with torch.no_grad():
        for _ in range(4):  # greedy decoding, uncompiled
            likeliest = qmodel.run_uncompiled(input_ids=expected).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, likeliest[:, None]], 1)
    found = qmodel.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected)


def test_a_call_on_the_wrong_device_is_told() -> None:
    qmodel = qlora_fx.transform(tiny_llama(1).cuda(), config())
    with pytest.raises(qlora_fx.InputError, match=r"input_ids is on cpu, the model on cuda:0"):
        qmodel(**batch())


FIRST = (*TWELVE, "mixtral", "qwen3_moe")


@pytest.mark.parametrize(
    "model_type", only_slow_but(FIRST, (*FIRST, *(t for t in BY_TYPE if t not in FIRST)))
)
def test_the_default_path_of(model_type: str) -> None:
    check(BY_TYPE[model_type], device="cuda")
