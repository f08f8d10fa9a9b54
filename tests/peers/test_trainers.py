"""transformers' Trainer and TRL's over a QLoRAModel: number by number what they do over PEFT + bitsandbytes."""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import qlora_fx
import bitsandbytes as bnb
import pytest
import torch
from qlora_fx import AdapterError, ConfigError, InputError, ModelError
from families import FAMILIES, build
from oracle import ours, random_adapter, reference
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from slow import only_slow_but
from small_models import batch, peer_llama, tiny_llama
from trainers import SAMPLED, SUPERVISED, logged, trained
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def both(recipe: str, backend: str) -> tuple[Any, Any]:
    """Ours and PEFT's model, from the same weights and the same adapter."""
    base = peer_llama(1)
    if recipe == "Reward":
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_config(_one_label(base.config))
    lora = LoraConfig(**LORA, task_type="SEQ_CLS" if recipe == "Reward" else "CAUSAL_LM")
    keep = ("lm_head", "score")
    adapter = random_adapter(base, 4, scale=0.05, keep=keep)
    theirs, _ = reference(base, adapter, copy.deepcopy(lora), keep=keep)
    if recipe == "Reward":  # its head trains as a whole in either stack
        adapter["base_model.model.score.weight"] = base.score.weight.detach().clone()
    mine, _ = ours(base, adapter, lora, compute_dtype="float32", backend=backend)
    return mine, theirs


def _one_label(config: Any) -> Any:
    config = copy.deepcopy(config)
    config.num_labels = 1
    return config


def check_run(recipe: str, backend: str, folder: Path, **options: Any) -> None:
    mine, theirs = both(recipe, backend)
    runs = [trained(m, recipe, folder / str(i), **options) for i, m in enumerate((mine, theirs))]
    for name, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3)):
        a, b = (logged(run, name) for run in runs)
        assert len(a) == len(b) == 20
        assert bool((b > 0).all()), "both would agree on zeros"
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)
    for i, run in enumerate(runs):
        run.save_model(str(folder / f"saved{i}"))
    files = [set(os.listdir(folder / f"saved{i}")) for i in range(2)]
    assert files[0] == files[1]
    tensors = [load_file(folder / f"saved{i}" / "adapter_model.safetensors") for i in range(2)]
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[1].items():
        torch.testing.assert_close(tensors[0][key], tensor, rtol=2e-2, atol=2e-4)


COMPILED = "SFT"
UNCOMPILED = [name for name in SUPERVISED if name not in (COMPILED, "DPO, precomputed")]


@pytest.mark.parametrize("recipe", only_slow_but(UNCOMPILED, SUPERVISED))
def test_losses_and_gradient_norms_are_the_references(recipe: str, tmp_path: Path) -> None:
    check_run(recipe, "eager", tmp_path)


@pytest.mark.parametrize("backend", only_slow_but(["aot_eager"], ["aot_eager", "inductor"]))
@pytest.mark.parametrize("recipe", only_slow_but([COMPILED], SUPERVISED))
def test_and_compiled(recipe: str, backend: str, tmp_path: Path) -> None:
    check_run(recipe, backend, tmp_path)


@pytest.mark.parametrize("backend", only_slow_but(["eager"], ["eager", "inductor"]))
def test_grpo_samples_and_learns_as_over_the_reference(backend: str, tmp_path: Path) -> None:
    """A step samples with a cache, asks for the base's log-probabilities, and trains."""
    SAMPLED.clear()
    runs = [
        trained(m, "GRPO", tmp_path / str(i), steps=8) for i, m in enumerate(both("GRPO", backend))
    ]
    for name, relative, absolute in (
        *(("grad_norm", 1e-3, 0.0), ("loss", 1e-2, 1e-6), ("kl", 1e-2, 1e-6)),
        *(("entropy", 1e-5, 0.0), ("reward", 0.0, 0.0), ("completions/mean_length", 0.0, 0.0)),
    ):
        a, b = (logged(run, name) for run in runs)
        assert len(a) >= 4
        assert bool(b.any()), "both would agree on zeros"
        torch.testing.assert_close(a, b, rtol=relative, atol=absolute)
    assert bool((logged(runs[0], "grad_norm") > 0).all())
    mine, theirs = SAMPLED[: len(SAMPLED) // 2], SAMPLED[len(SAMPLED) // 2 :]
    assert mine == theirs
    assert len({text for texts in mine for text in texts}) > 4, "other prompts, other samples"


def test_a_bitsandbytes_optimizer_by_its_usual_name(tmp_path: Path) -> None:
    check_run("Trainer", "eager", tmp_path, optim="paged_adamw_32bit")


def test_a_trainers_own_optimizer_updates_the_adapters_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its usual name, with the groups of LoRA+ that are passed as parameters; as ``paged_optimizer`` does."""
    updates = []
    own = bnb.functional.optimizer_update_32bit

    def counted(name: str, g: Any, *args: Any, **kwargs: Any) -> Any:
        updates.append(g.numel())
        return own(name, g, *args, **kwargs)

    monkeypatch.setattr(bnb.functional, "optimizer_update_32bit", counted)
    mine, other = both("Trainer", "eager")[0], both("Trainer", "eager")[0]
    flat = mine.paged_optimizer(lr=1e-3)
    a = trained(mine, "Trainer", tmp_path / "a", steps=5, optimizer=flat)
    assert len(updates) == 5
    b = trained(other, "Trainer", tmp_path / "b", steps=5, optim="paged_adamw_32bit")
    assert len(updates) == 10
    for name in ("loss", "grad_norm"):
        torch.testing.assert_close(logged(a, name), logged(b, name), rtol=1e-5, atol=0)


def test_groups_of_lora_plus_train_as_over_peft(tmp_path: Path) -> None:
    """``lora_B`` with sixteen times the learning rate (arXiv:2402.12354), by PEFT's own function."""
    curves = []
    for i, model in enumerate(both("Trainer", "eager")):
        optimizer = create_loraplus_optimizer(
            model, bnb.optim.PagedAdamW32bit, lr=1e-3, loraplus_lr_ratio=16
        )
        run = trained(model, "Trainer", tmp_path / str(i), optimizer=optimizer)
        curves.append(logged(run, "loss"))
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-4, atol=0)


def test_a_plain_accelerate_loop(tmp_path: Path) -> None:
    from accelerate import Accelerator

    curves = []
    for accelerated in (True, False):
        qmodel, _ = both("Trainer", "eager")
        optimizer = qmodel.paged_optimizer(lr=1e-2)
        model, curve = qmodel, []
        if accelerated:
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, optimizer = accelerator.prepare(qmodel, optimizer)
        for i in range(6):
            if accelerated:
                with accelerator.accumulate(model):
                    loss = model(**batch()).loss
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
            else:
                loss = model(**batch()).loss
                (loss / 2).backward()
                if i % 2:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                    optimizer.step()
                    optimizer.zero_grad()
            curve.append(float(loss))
        curves.append(curve)
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert curves[0][-1] < curves[0][0]


@pytest.mark.parametrize(
    ("optim", "own"),
    [("adamw_torch", False), ("paged_adamw_8bit", False), ("adamw_torch", True)],
)
def test_a_resumed_run_is_the_undisturbed_one_to_the_bit(
    optim: str, own: bool, tmp_path: Path
) -> None:
    """Trainer's own checkpoints, with its optimizer or with ``paged_optimizer`` over one buffer."""

    def run(resume: str | None) -> Any:
        model = both("Trainer", "eager")[0]
        return trained(
            model,
            "Trainer",
            tmp_path / "run",
            steps=6,
            optimizer=model.paged_optimizer(lr=1e-3) if own else None,
            resume=resume,
            optim=optim,
            save_strategy="steps",
            save_steps=3,
        )

    whole = run(None)
    again = run(str(tmp_path / "run" / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 6
    expected = whole.model.adapter_state_dict()
    for key, tensor in again.model.adapter_state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    first = load_file(tmp_path / "run" / "checkpoint-3" / "adapter_model.safetensors")
    assert any(not torch.equal(first[k], v) for k, v in expected.items())


def test_rows_by_length_and_metrics_over_logits(tmp_path: Path) -> None:
    """Batches of like lengths; ``compute_metrics`` gets the reference's logits and labels."""
    seen: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    runs = []

    def metrics(prediction: Any) -> dict[str, float]:
        logits, labels = (torch.as_tensor(t) for t in prediction)
        seen[-1].append((logits, labels))
        hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()
        return {"accuracy": float(hits)}

    for i, model in enumerate(both("Trainer", "eager")):
        seen.append([])
        run = trained(
            model,
            "Trainer",
            tmp_path / str(i),
            steps=4,
            evaluated=True,
            metrics=metrics,
            eval_strategy="steps",
            eval_steps=2,
            train_sampling_strategy="group_by_length",
        )
        runs.append(run)
    for name in ("loss", "eval_loss", "eval_accuracy"):
        a, b = (logged(run, name) for run in runs)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for (mine, labels), (theirs, their_labels) in zip(*seen, strict=True):
        assert torch.equal(labels, their_labels)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_bfloat16_beside_the_reference_under_autocast(tmp_path: Path) -> None:
    """``bf16=True`` is an autocast there; here ``compute_dtype`` decided. As close as that precision is."""
    _, theirs = both("Trainer", "eager")
    base = peer_llama(1)
    adapter = random_adapter(base, 4, scale=0.05, keep=("lm_head", "score"))
    lora = LoraConfig(**LORA, task_type="CAUSAL_LM")
    mine, _ = ours(base, adapter, lora, compute_dtype="bfloat16", backend="eager")
    runs = [
        trained(m, "Trainer", tmp_path / str(i), steps=8, bf16=True)
        for i, m in enumerate((mine, theirs))
    ]
    for name, tolerance in (("loss", 5e-3), ("grad_norm", 5e-2)):
        a, b = (logged(run, name) for run in runs)
        torch.testing.assert_close(a, b, rtol=tolerance, atol=0)


def test_checkpoints_have_pefts_files_and_the_best_one_comes_back(tmp_path: Path) -> None:
    mine, theirs = both("Trainer", "eager")
    settings = {"steps": 4, "save_strategy": "steps", "save_steps": 2}
    for i, model in enumerate((mine, theirs)):
        run = trained(model, "Trainer", tmp_path / str(i), **settings)
        assert sorted(os.listdir(run.args.output_dir)) == ["checkpoint-2", "checkpoint-4"]
    first, second = (set(os.listdir(tmp_path / str(i) / "checkpoint-2")) for i in range(2))
    assert first == second
    best = trained(
        both("Trainer", "eager")[0],
        "Trainer",
        tmp_path / "best",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the worst one, which is the first
        evaluated=True,
        **settings,
    )
    assert best.state.best_model_checkpoint.endswith("checkpoint-2")
    saved = load_file(f"{best.state.best_model_checkpoint}/adapter_model.safetensors")
    for key, tensor in best.model.adapter_state_dict().items():
        assert torch.equal(tensor, saved[key]), key


@pytest.mark.slow
def test_a_trainers_settings_leave_the_graph_as_it_is(tmp_path: Path) -> None:
    """torch.compile and gradient checkpointing are the trainer's; dtypes and programs stay ours."""
    mine, _ = both("SFT", "aot_eager")
    plain, _ = both("SFT", "aot_eager")
    settings = {"torch_compile": True, "gradient_checkpointing": True}
    a = trained(mine, "SFT", tmp_path / "a", steps=3, **settings)
    b = trained(plain, "SFT", tmp_path / "b", steps=3)
    torch.testing.assert_close(logged(a, "loss"), logged(b, "loss"), rtol=1e-6, atol=0)
    assert mine.memory_budget == 0.0
    assert plain.memory_budget is None
    assert {p.dtype for _, p in mine.adapter_parameters()} == {torch.float32}


def test_gradient_checkpointing_is_a_memory_budget() -> None:
    qmodel = small(backend="aot_eager")
    qmodel.gradient_checkpointing_enable({"use_reentrant": False})
    assert qmodel.memory_budget == 0.0
    qmodel.gradient_checkpointing_enable()
    qmodel.gradient_checkpointing_disable()
    assert qmodel.memory_budget is None
    if hasattr(
        PreTrainedModel, "activation_checkpointing_enable"
    ):  # its name from transformers 5.23 on
        qmodel.activation_checkpointing_enable()
        assert qmodel.memory_budget == 0.0
        qmodel.activation_checkpointing_disable()
        assert qmodel.memory_budget is None
    with pytest.warns(UserWarning, match='backend "eager" computes nothing again'):
        small().gradient_checkpointing_enable()


def test_an_autocast_around_the_first_call_is_not_captured() -> None:
    first, second = small(), small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = first(**batch()).loss
        hidden = first.get_base_model().base_model(batch()["input_ids"]).last_hidden_state
    assert hidden.dtype == torch.float32
    torch.testing.assert_close(loss, second(**batch()).loss, rtol=0, atol=0)


def small(backend: str = "eager", **options: Any) -> qlora_fx.QLoRAModel:
    return qlora_fx.transform(
        tiny_llama(1), LoraConfig(**LORA, **options), compute_dtype="float32", backend=backend
    )


def test_it_is_a_peft_model_around_a_model_of_the_users_class() -> None:
    model = tiny_llama(1)
    forward, kind = inspect.signature(model.forward), type(model)
    qmodel = qlora_fx.transform(model, LoraConfig(**LORA), backend="eager")
    twin = qmodel.get_base_model()
    assert isinstance(qmodel, PeftModel)
    assert isinstance(twin, kind)
    assert isinstance(twin, PreTrainedModel)
    assert type(twin).__name__ == kind.__name__
    assert inspect.signature(twin.forward) == forward
    assert twin.config is qmodel.config
    assert not [n for n, t in twin.state_dict().items() if t.device.type == "meta"]
    assert qmodel.get_input_embeddings().weight is qmodel.base.store["model.embed_tokens.weight"]
    assert qmodel.active_adapters == ["default"]
    assert qmodel.get_model_status().active_adapters == ["default"]
    qmodel.add_model_tags(["tag"])


def test_lm_evaluation_harness_gets_what_it_asks_for() -> None:
    """Of an object given as ``HFLM(pretrained=...)``, by a reading of lm_eval/models/huggingface.py of August 2026."""
    mine = small()
    assert isinstance(mine, torch.nn.Module)
    assert (mine.device, mine.dtype) == (torch.device("cpu"), torch.float32)
    assert mine.config.model_type == "llama"
    assert isinstance(mine.name_or_path, str)
    mine.eval()
    mine.tie_weights()
    assert mine.num_parameters() > 0
    ids = batch(2, 9, padded=0)["input_ids"]
    with torch.no_grad():
        logits = mine(ids).logits
        assert torch.equal(logits, mine(input_ids=ids).logits)
    assert logits.shape == (2, 9, mine.config.vocab_size)
    told = {"max_length": 11, "use_cache": True, "do_sample": False, "pad_token_id": 0}
    assert mine.generate(input_ids=ids, **told).shape == (2, 11)


def test_parameters_and_counts_are_pefts(capsys: Any) -> None:
    model = peer_llama(1)
    lora = LoraConfig(**LORA)
    adapter = random_adapter(model, 4, scale=0.1)
    theirs, _ = reference(model, adapter, copy.deepcopy(lora))
    mine, _ = ours(model, adapter, lora, backend="eager")
    names = [n for n, p in theirs.named_parameters() if p.requires_grad]
    assert [n for n, p in mine.named_parameters() if p.requires_grad] == names
    assert {n for n, _ in mine.named_parameters()} == {n for n, _ in theirs.named_parameters()}
    assert mine.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    mine.print_trainable_parameters()
    theirs.print_trainable_parameters()
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    a, b = get_peft_model_state_dict(mine), get_peft_model_state_dict(theirs)
    assert a.keys() == b.keys() == mine.adapter_state_dict().keys()
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize("model_type", only_slow_but(["gpt_oss"], ["xlnet", "gpt_oss"]))
def test_every_adapter_is_shown_also_of_several_parameters_in_a_module(model_type: str) -> None:
    """Trainers train what they see: five parameters of one module, stacks of experts with biases."""
    family = next(f for f in FAMILIES if f.model_type == model_type)
    qmodel = qlora_fx.transform(
        build(family), example_inputs=family.batch(2, 12), compute_dtype="float32", backend="eager"
    )
    shown = {id(p) for p in qmodel.parameters() if p.requires_grad}
    assert shown == {id(p) for _, p in qmodel.adapter_parameters()}


def test_a_new_head_has_pefts_names_and_trains_as_a_whole(tmp_path: Path) -> None:
    """RoBERTa's ``classifier`` holds two linears; PEFT copies all of it."""
    sizes = {"vocab_size": 101, "hidden_size": 64, "intermediate_size": 128, "num_labels": 3}
    config = RobertaConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config)
    lora = LoraConfig(**LORA, task_type="SEQ_CLS")
    theirs = get_peft_model(copy.deepcopy(model), copy.deepcopy(lora))
    mine = qlora_fx.transform(model, lora, compute_dtype="float32", backend="eager")

    def trains(m: Any) -> set[str]:
        return {n for n, p in m.named_parameters() if p.requires_grad}

    assert trains(mine) == trains(theirs)
    assert "base_model.model.classifier.modules_to_save.default.dense.weight" in trains(mine)
    assert get_peft_model_state_dict(mine).keys() == get_peft_model_state_dict(theirs).keys()
    assert mine.adapter_state_dict().keys() == get_peft_model_state_dict(theirs).keys()


@pytest.mark.parametrize(
    "options",
    only_slow_but(
        [{}, {"modules_to_save": ["lm_head"]}],
        [{}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}],
    ),
)
def test_the_backbone_runs_over_the_same_weights_with_gradients(options: Any) -> None:
    qmodel = small(**options)
    qlora_fx.testing.randomize_adapter(qmodel)
    inputs = batch()
    labels = inputs.pop("labels")
    twin = qmodel.get_base_model()
    hidden = twin.base_model(**inputs).last_hidden_state
    whole = qmodel(**inputs, return_logits=True).logits
    torch.testing.assert_close(twin.lm_head(hidden), whole, rtol=1e-6, atol=1e-6)
    with qmodel.disable_adapter(), torch.no_grad():
        hidden_without = twin.base_model(**inputs).last_hidden_state
        without = qmodel(**inputs, return_logits=True).logits
        torch.testing.assert_close(twin.lm_head(hidden_without), without, rtol=1e-6, atol=1e-6)
    assert float((without - whole).abs().max()) > 1e-3
    parameters = [p for _, p in qmodel.adapter_parameters()]

    def gradients(logits: torch.Tensor) -> list[torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return list(torch.autograd.grad(loss, parameters))

    pairs = zip(gradients(twin.lm_head(hidden)), gradients(whole), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
        assert float(other.norm()) > 0


def test_a_part_in_4_bits_says_what_to_call_instead() -> None:
    twin = small().get_base_model()
    with pytest.raises(ModelError, match="Call the model itself"):
        twin.model.layers[0].mlp.up_proj(torch.zeros(1, 48))
    with pytest.raises(ModelError, match=r"qmodel\.merge\(folder\)"):
        small().merge_and_unload()


def test_arguments_of_pefts_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    qmodel = small()
    qmodel.save_pretrained(tmp_path, safe_serialization=True)
    with pytest.raises(ConfigError, match="safe_serialization=False; accepted: True or None"):
        qmodel.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ConfigError, match="save_embedding_layers=True; accepted: 'auto' or False"):
        qmodel.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(ConfigError, match="subfolder='a'; accepted: low_cpu_mem_usage"):
        qmodel.load_adapter(tmp_path, subfolder="a")


def test_adapters_by_name_switch_without_another_capture(tmp_path: Path) -> None:
    qmodel = small()
    qlora_fx.testing.randomize_adapter(qmodel)
    inputs = batch()
    one = qmodel(**inputs).loss
    qmodel.add_adapter("other", qmodel.peft_config["default"])
    assert not any(p.requires_grad for n, p in qmodel.named_parameters() if ".other." in n)
    qmodel.set_adapter("other")
    assert [n for n, _ in qmodel.named_parameters() if ".other." in n and "lora_B" in n]
    two = qmodel(**inputs).loss
    assert abs(float(two - one)) > 1e-4
    with qmodel.disable_adapter():
        assert float(qmodel(**inputs).loss) == pytest.approx(float(two), rel=1e-6), "lora_B is zero"
    two.backward()
    assert all(p.grad is None for n, p in qmodel.named_parameters() if ".default." in n)
    graphs = len(qmodel.graph_modules)
    qmodel.set_adapter("default")
    torch.testing.assert_close(qmodel(**inputs).loss, one, rtol=0, atol=0)
    assert len(qmodel.graph_modules) == graphs
    qmodel.save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()
    fresh = small()
    fresh.load_adapter(tmp_path / "other", "other")
    fresh.load_adapter(tmp_path)
    torch.testing.assert_close(fresh(**inputs).loss, one, rtol=0, atol=0)
    with pytest.raises(AdapterError, match="no adapter 'ohter'; there are: default, other"):
        qmodel.set_adapter("ohter")
    with pytest.raises(ConfigError, match=r"beside one with bias='all'.*accepted"):
        small(bias="all").add_adapter("other", LoraConfig(**LORA, bias="all"))
    flat = qmodel.paged_optimizer(1e-3)
    qmodel.set_adapter("other")
    held = {
        p.data_ptr() for group in qmodel.paged_optimizer(1e-3).param_groups for p in group["params"]
    }
    assert held.isdisjoint(p.data_ptr() for group in flat.param_groups for p in group["params"])
    qmodel.set_adapter("default")
    qmodel.delete_adapter("other")
    assert not [n for n, _ in qmodel.named_parameters() if ".other." in n]


def test_rows_of_several_documents_are_the_documents_apart() -> None:
    """Block-diagonal attention from ``position_ids``; FlashAttention's own description of the rows is left out."""
    qmodel = small()
    qlora_fx.testing.randomize_adapter(qmodel)
    for lengths in ((5, 7, 9), (12, 4, 3, 8)):
        documents = [torch.randint(2, 101, (n,)) for n in lengths]
        ignored = torch.tensor([-100])
        row = qmodel(
            input_ids=torch.cat(documents)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            labels=torch.cat([torch.cat([ignored, d[1:]]) for d in documents])[None],
            max_length_q=max(lengths),
        )
        apart = [qmodel(input_ids=d[None], labels=d[None]).loss * (len(d) - 1) for d in documents]
        true = sum(apart) / sum(n - 1 for n in lengths)
        torch.testing.assert_close(row.loss, true, rtol=1e-5, atol=0)
    assert len(qmodel.graph_modules) == 3, "one for the rows, whatever their longest document"
    with pytest.raises(InputError, match="max_length_q is read by FlashAttention"):
        qmodel(input_ids=torch.ones(1, 4, dtype=torch.long), max_length_q=3)
