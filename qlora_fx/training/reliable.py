"""A trainer whose runs can be stopped anywhere, resumed to the bit, and say what went wrong."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback

from ..errors import CheckpointError, ConfigError, TrainingError, users_stacklevel
from ..model import QLoRAModel
from ..runtime.checkpoint_writer import FolderWriter, remove_folder, remove_litter, sync
from ..transformers_internals import last_checkpoint, remove_older_checkpoints
from . import checkpoint
from .memory import is_out_of_memory, let_go, lower_budget
from .non_finite import first_non_finite
from .signals import Stop, noticed

T = TypeVar("T", bound=Trainer)
OnNonFinite = Literal["stop", "skip"]
MOST_SKIPPED = 10
"""Steps in a row that are skipped before a run stops after all."""


def reliable(trainer: type[T], *, on_non_finite: OnNonFinite = "stop") -> type[T]:
    """``trainer``, to be used as ever, whose runs lose nothing.

    - A checkpoint is whole or not there, and has the base's fingerprint, the settings, the versions and checksums of
      its files, which are checked when a run resumes from it.
    - SIGTERM, as cluster schedulers send it, and Ctrl-C finish the step, save, and leave as the signal would have
      (exit status 143, KeyboardInterrupt). A second one acts at once.
    - A loss or gradient that is not finite is traced to the operator that made it.
    - A step that runs out of memory lowers ``memory_budget`` and is taken again, once.

    Args:
        trainer: ``transformers.Trainer``, or a subclass such as TRL's.
        on_non_finite: "stop" raises; "skip" leaves the step out with a warning, ten in a row at most.

    Raises:
        ConfigError: another ``on_non_finite``.
    """
    if on_non_finite not in ("stop", "skip"):
        raise ConfigError(f"on_non_finite={on_non_finite!r}; accepted: 'stop' or 'skip'")
    members = {"on_non_finite": on_non_finite, "__module__": trainer.__module__}
    made: Any = type(trainer.__name__, (ReliableTrainer, trainer), members)
    return made  # type: ignore[no-any-return]


class ReliableTrainer(Trainer):
    """See ``reliable``.

    Raises:
        ConfigError: the model is no ``QLoRAModel``, another trainer is training it, or there are several processes.
        CheckpointError: a checkpoint to resume from is damaged or of something else; or one cannot be written, and
            the last one is as it was.
        TrainingError: a loss or gradient that is not finite.
    """

    on_non_finite: OnNonFinite = "stop"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, QLoRAModel):
            raise ConfigError(
                f"a model of class {type(self.model).__name__}; accepted: what qlora_fx.transform and from_pretrained "
                "return"
            )
        if self.args.world_size > 1:
            raise ConfigError(
                f"{self.args.world_size} processes; accepted: one. Checkpoints of several are not written as one yet"
            )
        self.stop = Stop()
        self.window: list[tuple[dict[str, Any], Any]] = []
        self.losses: list[torch.Tensor] = []
        self.skipped = 0
        self.staging: Path | None = None
        self.to_push: Path | None = None
        self.add_callback(AtSteps(self))

    # -- a run ------------------------------------------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        folder = resume_from_checkpoint
        if folder is True:
            folder = last_checkpoint(self.args.output_dir)
        if folder:
            checkpoint.check(str(folder), self.model.base)
        self.window, self.losses, self.skipped = [], [], 0
        with trained_by(self.model, self), noticed() as self.stop:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        self.stop.leave()
        return result

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        self.window.append((dict(inputs), num_items_in_batch))
        params = [p for _, p in self.model.adapter_parameters()]
        before = [p.grad for p in params]  # of the micro-batches of this step so far
        for p in params:
            p.grad = None
        random = random_state(self.args.device)
        loss: torch.Tensor
        budget = ""
        try:
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                budget = lower_budget(self.model)
            if not budget:
                raise
            let_go(error)
        if budget:  # outside of the handler, which would hold the frames of the failed step
            warnings.warn(
                f"step {self.state.global_step + 1} ran out of memory; trying it again with memory_budget={budget}",
                stacklevel=users_stacklevel(),
            )
            for p in params:
                p.grad = None
            set_random_state(self.args.device, random)
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
        for p, grad in zip(params, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
        self.losses.append(loss.detach())
        return loss

    # -- faults -----------------------------------------------------------------------------------

    def check_finite(self) -> None:
        """Before the optimizer's step.

        Raises:
            TrainingError: the loss or a gradient is not finite, and such steps are not skipped.
        """
        window, losses = self.window, self.losses
        self.window, self.losses = [], []
        if self.accelerator.scaler is not None:
            return  # float16: its infinities are how the scaler finds a scale
        params = [p for _, p in self.model.adapter_parameters()]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        if bool(torch.isfinite(torch.stack([*losses, norm.to(losses[0].device)])).all()):
            self.skipped = 0
            return
        loss_is_finite = all(bool(loss.isfinite()) for loss in losses)
        what = "a gradient" if loss_is_finite else "the loss"
        text = f"step {self.state.global_step + 1}: {what} is not finite; {self.traced(window)}"
        for p in params:
            p.grad = None  # optimizers leave parameters without gradients as they are
        self.skipped += 1
        if self.on_non_finite == "stop" or self.skipped > MOST_SKIPPED:
            last = last_checkpoint(self.args.output_dir) or "none was saved yet"
            raise TrainingError(f"{text}. The last checkpoint: {last}")
        warnings.warn(f"{text}. The step is skipped", stacklevel=users_stacklevel())

    def traced(self, window: list[tuple[dict[str, Any], Any]]) -> str:
        """Where the first value that is not finite comes from, in the micro-batches of a step."""
        for i, (inputs, count) in enumerate(window):
            with torch.random.fork_rng(), first_non_finite(self.model) as faults:
                prepared = self._prepare_inputs(dict(inputs))
                with self.compute_loss_context_manager():
                    loss = self.compute_loss(self.model, prepared, num_items_in_batch=count)
                if not faults:
                    loss.backward()
            if faults:
                where = f" in micro-batch {i + 1} of {len(window)}" if len(window) > 1 else ""
                return f"first at {faults[0]}{where}"
        return "it does not come again when the step is run operator by operator"

    # -- checkpoints ------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        run = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        with FolderWriter(run / name, keep=False) as writer:
            try:
                self.staging = writer.scratch
                super()._save_checkpoint(model, trial)
            except (OSError, RuntimeError, SafetensorError) as error:
                raise CheckpointError(
                    f"{run / name} cannot be written: {error}. The checkpoints before it are as they were"
                ) from error
            finally:
                self.staging = None
            made = writer.scratch / name
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == made:
                self.state.best_model_checkpoint = os.fspath(run / name)
                self.state.save_to_json(os.fspath(made / "trainer_state.json"))
            for item in list(made.iterdir()):
                os.rename(item, writer.scratch / item.name)
            made.rmdir()
            writer.text(checkpoint.STAMP, checkpoint.stamp(writer.scratch, self.model.base))
            for item in writer.scratch.rglob("*"):
                sync(item)
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        remove_litter(run / "checkpoint-*")
        remove_older_checkpoints(os.fspath(run), limit, best, remove_folder)
        if self.to_push is not None:
            self.to_push = None
            super()._push_from_checkpoint(os.fspath(run / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self.to_push = Path(checkpoint_folder)  # once it is where it stays


class AtSteps(TrainerCallback):
    """What a trainer does before and after each of the optimizer's steps."""

    def __init__(self, trainer: ReliableTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_finite()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stop.signal:
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def trained_by(qmodel: QLoRAModel, trainer: ReliableTrainer) -> Iterator[None]:
    """One trainer at a time.

    Raises:
        ConfigError: there is one already.
    """
    if qmodel.trainer is not None:
        raise ConfigError(
            f"this model is being trained by another {type(qmodel.trainer).__name__}; accepted: one at a time"
        )
    qmodel.trainer = trainer
    try:
        yield
    finally:
        qmodel.trainer = None


def random_state(device: torch.device) -> Mapping[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(device: torch.device, state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
