"""Recorded steps on a GPU beside the same steps launched one by one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from families import FAMILIES, build
from families.pictures import with_pictures
from peft import LoraConfig
from qlora_fx.runtime.cuda_graphs import Graphed, Places, Recorder
from qlora_fx.testing import Oracle, compare, randomize_adapter, relative_error
from qlora_fx.testing.step import step as truth
from small_models import batch, tiny_llama
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""FlashAttention's backward adds up in any order."""
SIZES = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 32}


def on_gpu(rows: int, tokens: int, seed: int = 0, padded: int = 4) -> dict[str, Tensor]:
    return {k: v.cuda() for k, v in batch(rows, tokens, padded=padded, seed=seed).items()}


def made(dtype: torch.dtype, dropout: float = 0.0, **changes: Any) -> tuple[Any, Any]:
    model = tiny_llama(3, **(SIZES | changes)).cuda().to(dtype)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=dropout)
    qmodel = qlora_fx.transform(
        copy.deepcopy(model), config, compute_dtype=dtype, cuda_graphs=True, memory_budget=1.0
    )
    randomize_adapter(qmodel)
    return model, qmodel


def recordings(qmodel: Any) -> int:
    parts = (m for p in qmodel.programs if p.graphed for m in p.graphed.children())
    return sum(len(m.recordings) for m in parts if isinstance(m, Graphed))


def step(qmodel: Any, values: dict[str, Tensor]) -> list[Tensor]:
    qmodel.zero_grad()
    loss = qmodel(**values).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for _, p in qmodel.adapter_parameters())]


def one_by_one(qmodel: Any, values: dict[str, Tensor]) -> list[Tensor]:
    """The step without its recordings, which stay."""
    kept = [(p, p.graphed) for p in qmodel.programs]
    for p, _ in kept:
        p.graphed = None
    found = step(qmodel, values)
    for p, graphed in kept:
        p.graphed = graphed
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_at_several_shapes_with_updates_between(dtype: torch.dtype) -> None:
    _, qmodel = made(dtype)
    optimizer = qmodel.paged_optimizer(1e-2)
    for i in range(6):
        for rows, tokens, padded in ((3, 21, 4), (2, 64, 0), (1, 7, 0)):
            values = on_gpu(rows, tokens, seed=i, padded=padded)
            expected = one_by_one(qmodel, values)
            for mine, true in zip(step(qmodel, values), expected, strict=True):
                assert relative_error(mine, true) < LIMIT[dtype]
                assert bool(true.any())
        optimizer.step()
    assert recordings(qmodel) == 3


def test_a_recorded_step_beside_float64() -> None:
    model, qmodel = made(torch.float32)
    values = on_gpu(3, 21)
    for _ in range(4):
        step(qmodel, values)
    report = compare(model, qmodel, values)
    assert report.passed, report
    assert recordings(qmodel) == 1


def test_gradients_add_up_and_a_second_forward_runs_by_itself() -> None:
    _, qmodel = made(torch.float32)
    for _ in range(3):
        step(qmodel, on_gpu(3, 21))
    qmodel.zero_grad()
    for seed in (1, 2):
        qmodel(**on_gpu(3, 21, seed)).loss.backward()
    first, second = (qmodel(**on_gpu(3, 21, seed)).loss for seed in (3, 4))
    (first - 0.5 * second).backward()
    found = [p.grad.clone() for _, p in qmodel.adapter_parameters()]
    qmodel.cuda_graphs = False
    parts = [step(qmodel, on_gpu(3, 21, seed))[1:] for seed in (1, 2, 3, 4)]
    for mine, a, b, c, d in zip(found, *parts, strict=True):
        assert relative_error(mine, a + b + c - 0.5 * d) < 1e-5


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_dropout_is_drawn_anew_and_the_same_in_backward(budget: float) -> None:
    _, qmodel = made(torch.float32, 0.3, hidden_size=256, intermediate_size=512, head_dim=64)
    qmodel.memory_budget = budget
    values = on_gpu(3, 21)
    for _ in range(3):
        step(qmodel, values)
    assert recordings(qmodel) == 1
    torch.manual_seed(3)
    first, second = step(qmodel, values), step(qmodel, values)
    assert not torch.equal(first[0], second[0])
    torch.manual_seed(3)
    again = step(qmodel, values)
    for a, b in zip(first, again, strict=True):
        assert relative_error(a, b) < 1e-6
    # The gradient is that of the loss with this very mask: a small step along it lowers the loss by its square.
    with torch.no_grad():
        norm = sum(float(g.square().sum()) for g in first[1:])
        for (_, p), g in zip(qmodel.adapter_parameters(), first[1:], strict=True):
            p -= 1e-4 / norm**0.5 * g
    torch.manual_seed(3)
    lower = step(qmodel, values)[0]
    assert float(first[0] - lower) == pytest.approx(1e-4 * norm**0.5, rel=0.05)


def test_memory_is_given_back() -> None:
    _, qmodel = made(torch.bfloat16, vocab_size=32000)
    values = on_gpu(8, 512, padded=0)
    for _ in range(4):
        step(qmodel, values)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    qmodel.cuda_graphs = False
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held


class Waits(torch.nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (x @ w * int(x.sum() > 0),)


def test_what_waits_for_the_device_is_found_before_it_is_recorded() -> None:
    device = torch.device("cuda:0")
    part = Graphed(Waits(), Places([False, True]), tuple, lambda: Recorder(device))
    x, w = torch.ones(4, 3, device=device), torch.randn(3, 2, device=device)
    with pytest.warns(UserWarning, match="launched one by one"):
        found = [part(x, w)[0] for _ in range(6)]
    assert not part.recordings
    assert all(torch.equal(y, found[0]) for y in found)
    torch.randn(3, device=device)  # a recording that had failed would forbid it


def test_evaluation_between_steps() -> None:
    _, qmodel = made(torch.bfloat16)
    values = on_gpu(2, 33)
    expected = one_by_one(qmodel, values)
    with torch.no_grad():
        logits = qmodel.eval()(**values).logits
    for _ in range(5):
        for mine, true in zip(step(qmodel.train(), values), expected, strict=True):
            assert relative_error(mine, true) < LIMIT[torch.bfloat16]
        with torch.no_grad():
            assert relative_error(qmodel.eval()(**values).logits, logits) < LIMIT[torch.bfloat16]
    assert recordings(qmodel) == 2


EXPERTS = MixtralConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
)
T5 = T5Config(
    vocab_size=128,
    d_model=64,
    d_kv=16,
    d_ff=192,
    num_layers=4,
    num_heads=4,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(dtype: torch.dtype) -> None:
    """One launch multiplies the experts in bfloat16 alone; otherwise the host reads where each begins, and nothing is recorded."""
    model = MixtralForCausalLM(EXPERTS).cuda().to(dtype)
    beside_one_by_one(model, dtype, int(dtype == torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_decoders(dtype: torch.dtype) -> None:
    beside_one_by_one(T5ForConditionalGeneration(T5).cuda().to(dtype), dtype, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pictures(dtype: torch.dtype) -> None:
    """Of other numbers and sizes; what is counted in them is counted before what is recorded."""
    model = build(next(f for f in FAMILIES if f.model_type == "qwen2_5_vl")).train().cuda()
    model = model.to(dtype)
    batches = [
        {k: v.cuda() for k, v in with_pictures(*told).items()}
        for told in (
            (3, 30, (0, (1, 4, 4)), (1, (1, 6, 4)), (2, (1, 4, 8))),
            (2, 41, (0, (1, 8, 8)), (1, (1, 2, 4))),
        )
    ]
    qmodel = qlora_fx.transform(
        copy.deepcopy(model),
        compute_dtype=dtype,
        cuda_graphs=True,
        memory_budget=1.0,
        example_inputs=batches[0],
    )
    randomize_adapter(qmodel)
    for _ in range(4):
        for values in batches:
            plain = one_by_one(qmodel, values)
            for mine, true in zip(step(qmodel, values), plain, strict=True):
                assert relative_error(mine, true) < 5 * LIMIT[dtype]
    for values in batches:
        _, true_gradients = truth(Oracle(model, qmodel.base), values)
        step(qmodel, values)
        errors = [p.grad.double() - true_gradients[n] for n, p in qmodel.adapter_parameters()]
        size = torch.stack([t.norm() for t in true_gradients.values()]).norm()
        off = float(torch.stack([e.norm() for e in errors]).norm() / size)
        print(f"{dtype}: gradients {off:.1e} off")
        assert off < 10 * LIMIT[dtype]
    assert recordings(qmodel) > 0


def beside_one_by_one(model: Any, dtype: torch.dtype, expected: int) -> None:
    qmodel = qlora_fx.transform(model, compute_dtype=dtype, cuda_graphs=True, memory_budget=1.0)
    randomize_adapter(qmodel)
    optimizer = qmodel.paged_optimizer(1e-2)
    for seed in range(5):
        values = on_gpu(3, 21, seed=seed)
        plain = one_by_one(qmodel, values)
        for mine, true in zip(step(qmodel, values), plain, strict=True):
            assert relative_error(mine, true) < 5 * LIMIT[dtype]
        optimizer.step()
    assert recordings(qmodel) == expected


def test_in_a_trainer(tmp_path: Path) -> None:
    """Accumulation, clipping, bf16=True, a paged optimizer, evaluation between: the losses without recordings."""
    rows = torch.randint(2, 101, (4, 48), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows * 16]
    found = []
    for graphs in (False, True):
        torch.manual_seed(0)
        _, qmodel = made(torch.bfloat16)
        qmodel.cuda_graphs = graphs
        args = TrainingArguments(
            str(tmp_path),
            max_steps=16,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            optim="paged_adamw_8bit",
            learning_rate=1e-2,
            bf16=True,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=8,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        )
        run = Trainer(model=qmodel, args=args, train_dataset=data, eval_dataset=data[:4])
        run.train()
        found.append([e["loss"] for e in run.state.log_history if "loss" in e])
        assert bool(recordings(qmodel)) is graphs
    assert len(found[0]) == 16
    assert found[1] == pytest.approx(found[0], rel=1e-2)
    assert found[0][-1] < 0.99 * found[0][0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "experts"])
def test_tokens(kind: str, dtype: torch.dtype) -> None:
    """With a cache read where it lies, its room grown twice, rows of other lengths, twice after each other: logits are those without."""
    if kind == "experts":
        model = MixtralForCausalLM(EXPERTS).cuda().to(dtype)
        qmodel = qlora_fx.transform(model, compute_dtype=dtype, cuda_graphs=True)
        randomize_adapter(qmodel)
    else:
        _, qmodel = made(dtype)
    given = on_gpu(3, 250, padded=0)
    del given["labels"]
    given["attention_mask"][1, :40] = 0
    told = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    told |= {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 16}
    found = [qmodel.generate(**given, **told) for _ in range(4)]
    assert bool(recordings(qmodel)) is (kind == "llama" or dtype == torch.bfloat16)
    with torch.no_grad():
        for out in found:
            whole = out.sequences
            mask = torch.nn.functional.pad(
                given["attention_mask"], (0, whole.shape[1] - 250), value=1
            )
            places = (mask.cumsum(1) - 1).clamp(min=0)
            true = qmodel.run_uncompiled(whole, attention_mask=mask, position_ids=places).logits
            for i, mine in enumerate(out.logits):
                assert relative_error(mine, true[:, 249 + i]) < 5 * LIMIT[dtype]


def test_memory_of_tokens_is_given_back() -> None:
    _, qmodel = made(torch.bfloat16)
    ids = on_gpu(8, 2000, padded=0)["input_ids"]
    for _ in range(4):
        qmodel.generate(input_ids=ids, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    qmodel.cuda_graphs = False
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < held
