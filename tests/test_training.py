"""reliable(Trainer): checkpoints whole and checked, signals, faults named, memory that runs out."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import qlora_fx
import pytest
import torch
from qlora_fx import AdapterError, CheckpointError, ConfigError, TrainingError
from datasets import Dataset
from peft import LoraConfig
from qlora_fx.runtime import checkpoint_writer
from qlora_fx.training import first_non_finite, reliable
from small_models import batch, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore:Paged.*CPU")


def small(
    *, r: int = 4, seed: int = 0, backend: str = "eager", dropout: float = 0.0
) -> qlora_fx.QLoRAModel:
    settings = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": dropout}
    lora = LoraConfig(r=r, lora_alpha=8, **settings)
    base = tiny_llama(2)
    if seed:
        torch.manual_seed(seed)
        torch.nn.init.normal_(base.model.layers[1].mlp.up_proj.weight, std=0.02)
    model = qlora_fx.transform(base, lora, compute_dtype="float32", backend=backend)
    qlora_fx.testing.randomize_adapter(model)
    return model


def trainer(
    model: Any, folder: Path, *, kind: Any = None, evaluated: bool = False, **options: Any
) -> Any:
    ids = torch.randint(2, 101, (40, 16), generator=torch.Generator().manual_seed(0)).tolist()
    settings: dict[str, Any] = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(str(folder), **(settings | options))
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ids])
    words = {"eval_dataset": data} if evaluated else {}
    return (kind or reliable(Trainer))(model=model, args=args, train_dataset=data, **words)


def values(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.adapter_state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[k], b[k]) for k in a)


class At(TrainerCallback):
    """Does something in the step after ``step``."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


# -- the same training ------------------------------------------------------------------------------


def test_it_trains_as_the_trainer_itself_and_leaves_its_files(tmp_path: Path) -> None:
    runs = []
    for i, kind in enumerate((reliable(Trainer), Trainer)):
        model = small()
        run = trainer(model, tmp_path / str(i), kind=kind)
        run.train()
        runs.append((values(model), {p.name for p in (tmp_path / str(i)).rglob("*")}))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1] - runs[1][1] == {"qlora_fx.json"}
    assert runs[1][1] <= runs[0][1]
    assert type(run).__name__ == "Trainer"


def test_the_best_checkpoint_is_known_by_the_name_it_keeps(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(small(), tmp_path, evaluated=True, save_total_limit=1, **options)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.is_dir()
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# -- checkpoints ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_the_same_bits(tmp_path: Path) -> None:
    """Fifty of them. ``make test`` kills the writing of a folder at each of its steps (runtime/test_folder.py)."""
    script = Path(__file__).with_name("killed_runs.py")
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "runs"), "50"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["finished"] >= 1
    assert found["checkpoints"] > 0
    assert found["killed"] >= 50


def test_an_old_checkpoint_is_removed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while its files go, it is no checkpoint any more; what is left of it goes with the next one's."""
    gone: list[str] = []
    monkeypatch.setattr(
        checkpoint_writer.shutil,
        "rmtree",
        lambda path, **_: gone.append(Path(path).name),  # killed: nothing of it is removed
    )
    litter = tmp_path / ".checkpoint-1.99999999.partial"
    litter.mkdir()
    trainer(small(), tmp_path, max_steps=6, save_steps=2, save_total_limit=1).train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert {litter.name, f".checkpoint-2.{os.getpid()}.partial"} <= set(gone)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after two steps."""
    folder = tmp_path_factory.mktemp("saved")
    trainer(small(), folder, max_steps=2).train()
    return folder / "checkpoint-2"


def copied(saved: Path, folder: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, folder / saved.name))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "adapter_model.safetensors", "trainer_state.json"]
)
def test_a_damaged_file_is_named(name: str, saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    model = small()
    before = values(model)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        trainer(model, tmp_path).train(resume_from_checkpoint=str(folder))
    assert same(before, values(model))
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_something_else_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="another base: its weights are not those of this model"
    ):
        trainer(small(seed=7), tmp_path).train(resume_from_checkpoint=str(saved))
    with pytest.raises(CheckpointError, match=r"saved from lora\.r=4, this model has 8"):
        trainer(small(r=8), tmp_path).train(resume_from_checkpoint=str(saved))
    with pytest.raises(CheckpointError, match="is no folder; accepted: a trainer's checkpoint"):
        trainer(small(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "absent"))


def test_other_versions_are_said(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    stamp = json.loads((folder / "qlora_fx.json").read_text())
    stamp["versions"]["torch"] = "2.0.0"
    (folder / "qlora_fx.json").write_text(json.dumps(stamp))
    with pytest.warns(UserWarning, match="with other versions.*torch 2.0.0 then") as caught:
        trainer(small(), tmp_path, max_steps=3).train(resume_from_checkpoint=str(folder))
    assert any(w.filename == __file__ for w in caught)


def test_pefts_checkpoint_of_another_rank_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path)
    (folder / "qlora_fx.json").unlink()
    with pytest.raises(AdapterError, match=r"rank 4 .*there, rank 8"):
        trainer(small(r=8), tmp_path).train(resume_from_checkpoint=str(folder))


def test_a_full_disk_stops_with_a_message_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    run = trainer(model, tmp_path)
    own = torch.save

    def full(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        if run.state.global_step == 4 and "optimizer" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 cannot be written.*No space left.*as they were"
    ):
        run.train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2"]
    monkeypatch.undo()
    trainer(model, tmp_path).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-6").is_dir()


# -- signals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("number", "raised", "code"),
    [(signal.SIGTERM, SystemExit, 143), (signal.SIGINT, KeyboardInterrupt, None)],
)
def test_a_signal_finishes_the_step_saves_and_leaves(
    number: int, raised: Any, code: int | None, backend: str, tmp_path: Path
) -> None:
    whole = small(backend=backend)
    trainer(whole, tmp_path / "whole", max_steps=4).train()
    stopped = small(backend=backend)
    run = trainer(stopped, tmp_path / "a", max_steps=4, save_steps=100)
    run.add_callback(At(2, lambda: os.kill(os.getpid(), number)))
    handler = signal.getsignal(number)
    with pytest.raises(raised) as caught:
        run.train()
    if code is not None:
        assert caught.value.code == code
    assert signal.getsignal(number) is handler
    assert [p.name for p in (tmp_path / "a").glob("checkpoint-*")] == ["checkpoint-3"]
    again = small(backend=backend)
    trainer(again, tmp_path / "a", max_steps=4, save_steps=100).train(resume_from_checkpoint=True)
    assert same(values(again), values(whole))


# -- faults -----------------------------------------------------------------------------------------


def test_a_value_that_is_not_finite_is_traced_to_what_made_it() -> None:
    model = small()
    with first_non_finite(model) as faults:
        model(**batch()).loss.backward()
    assert not faults
    broken = dict(model.adapter_parameters())
    key = next(k for k in broken if "layers.1.mlp.down_proj" in k and "lora_B" in k)
    with torch.no_grad():
        broken[key][0, 0] = float("inf")
    model(**batch())
    with first_non_finite(model) as faults:
        model(**batch())
    assert str(faults[0]) == f"{key} (parameter, forward)"
    with torch.no_grad():
        broken[key].fill_(3e38)
        broken[key.replace("lora_B", "lora_A")].mul_(1e6)
    with first_non_finite(model) as faults:
        model(**batch())
    assert faults[0].site.startswith("model.layers.1.mlp.down_proj"), faults[0]
    assert faults[0].stage == "forward"


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_a_loss_that_is_not_finite_stops_with_step_site_and_stage(
    backend: str, tmp_path: Path
) -> None:
    model = small(backend=backend)
    run = trainer(model, tmp_path)
    key, p = next((k, p) for k, p in model.adapter_parameters() if "layers.1.self_attn.o_proj" in k)
    run.add_callback(At(3, lambda: p.data.fill_(float("nan"))))
    with pytest.raises(
        TrainingError, match=rf"step 4: the loss is not finite; first at {key}.*checkpoint-2"
    ):
        run.train()
    assert [q.name for q in tmp_path.iterdir()] == ["checkpoint-2"]
    trainer(small(backend=backend), tmp_path).train(resume_from_checkpoint=True)


class BadBatch(Trainer):
    """Its loss is nan in the second micro-batch of step 2."""

    count = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.count == 4 else loss


def test_a_step_can_be_skipped(tmp_path: Path) -> None:
    model = small()
    seen: list[dict[str, torch.Tensor]] = []

    class See(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(values(model))

    run = trainer(model, tmp_path, kind=reliable(BadBatch, on_non_finite="skip"), max_steps=3)
    run.add_callback(See())
    with pytest.warns(
        UserWarning, match=r"step 2: the loss is not finite; it does not come again.*skipped"
    ):
        run.train()
    assert same(seen[0], seen[1])
    assert not same(seen[1], seen[2])
    assert all(bool(v.isfinite().all()) for v in seen[2].values())


class Hungry(Trainer):
    """Runs out of memory in its second micro-batch, after a part of backward."""

    count = 0
    error: Any = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        loss = super().training_step(model, *args, **kwargs)
        if self.count == 2:
            raise self.error
        return loss


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_memory_that_runs_out_lowers_the_budget_and_repeats_the_step(
    backend: str, tmp_path: Path
) -> None:
    model = small(backend=backend, dropout=0.2)
    before = values(model)
    trainer(model, tmp_path / "a", max_steps=2).train()
    undisturbed = values(model)
    assert not same(undisturbed, before)
    model.load_adapter_state_dict(before)
    with pytest.warns(UserWarning, match=r"step 1 ran out of memory.*memory_budget=0\.5"):
        trainer(model, tmp_path / "b", kind=reliable(Hungry), max_steps=2).train()
    assert model.memory_budget == 0.5
    assert same(values(model), undisturbed)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("something else"),
        pytest.param(torch.OutOfMemoryError("CUDA"), marks=pytest.mark.slow),
    ],
)
def test_other_errors_and_a_budget_that_is_spent_are_the_users(error: Any, tmp_path: Path) -> None:
    spent = isinstance(error, torch.OutOfMemoryError)
    model = small(backend="aot_eager" if spent else "eager")
    if spent:
        model.memory_budget = 0.0
    kind = reliable(type("Hungry", (Hungry,), {"error": error}))
    with pytest.raises(type(error), match=str(error)):
        trainer(model, tmp_path, kind=kind, max_steps=2).train()


# -- bad input --------------------------------------------------------------------------------------


def test_what_it_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on_non_finite='ignore'; accepted: 'stop' or 'skip'"):
        reliable(Trainer, on_non_finite="ignore")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a model of class LlamaForCausalLM; accepted"):
        trainer(tiny_llama(1), tmp_path)


def test_two_trainers_over_one_model(tmp_path: Path) -> None:
    model = small()
    first, second = (
        trainer(model, tmp_path / "a", max_steps=2),
        trainer(model, tmp_path / "b", max_steps=2),
    )
    first.add_callback(At(1, second.train))
    with pytest.raises(
        ConfigError, match="being trained by another Trainer; accepted: one at a time"
    ):
        first.train()
    assert model.trainer is None
    second.train()  # one after the other


def test_a_dataset_without_columns_or_labels_and_rows_that_are_too_long(tmp_path: Path) -> None:
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = trainer(model, tmp_path)
        run.train_dataset = Dataset.from_list([{"words": [1, 2, 3]}])
        with pytest.raises(ValueError, match="No columns in the dataset match the model's forward"):
            run.train()
        run = trainer(model, tmp_path, max_steps=1)
        run.train_dataset = Dataset.from_list([{"input_ids": [5, 6, 7, 8]}] * 8)
        with pytest.raises(ValueError, match="did not return a loss from the inputs"):
            run.train()
