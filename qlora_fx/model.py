"""QLoRAModel: what ``transform`` returns. Behaves as the user's model; its adapters are what trains."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import fx, nn

from .adapters.initialize import add_adapters
from .capture.cache import caches
from .checkpoints.save import write_quantized
from .compiler.compile import Prepared
from .compiler.programs import Programs
from .compiler.request import check_cuda_graphs, check_memory_budget
from .errors import InputError, users_stacklevel
from .explain import Explanation, explain
from .memory.saved_activations import Activations, saved_activations
from .merging.merge import MergeReport, merge
from .optimizer import adapter_optimizer, check_groups
from .twin.adapter_graphs import WHOLE, AdapterGraphs
from .twin.calls import Calls
from .twin.peft_model import StorePeftModel
from .units import parse_size


class QLoRAModel(StorePeftModel):
    """A transformed model.

    Call it with the model's own arguments; it returns the model's own output class. Each new set of
    arguments (names, ranks, dtypes, flags) is captured and compiled on first use; all of them read the
    same parameters. Batch and sequence are free: other sizes neither capture nor compile again.

    Made by :func:`qlora_fx.transform` and :func:`qlora_fx.from_pretrained`.

    Args:
        prepared: its store has all weights.

    Attributes:
        adapter_graphs: all captured graphs, by what of an adapter is in them.
        trainer: the one that is training it now.
    """

    def __init__(self, prepared: Prepared) -> None:
        base = prepared.base
        add_adapters(base)
        super().__init__(base)
        request = prepared.request
        programs = Programs(base, request.backend, request.memory_budget, request.cuda_graphs)
        programs.add(prepared.signature, prepared.capture, prepared.result)
        self.adapter_graphs = AdapterGraphs(self.named_adapters, programs)
        self._calls = Calls(self, self.adapter_graphs)
        self._compute = prepared.compute
        self._budget_before: tuple[int | float | None] | None = None
        self.trainer: object | None = None
        self.train(request.training)

    # -- the model it stands for ------------------------------------------------------------------

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the linears multiply."""
        return self._compute.dtype

    @property
    def lora_config(self) -> LoraConfig:
        """The ``peft.LoraConfig`` in force."""
        return self.base.config.lora

    @property
    def programs(self) -> Programs:
        """The captured graphs of the active adapter; while adapters are disabled those of the first, whichever is active."""
        return self.adapter_graphs.of(self._calls.adapter)

    @property
    def submodels(self) -> dict[str, Programs]:
        """The same of the backbone and the encoder, by path, where they were ever called for themselves."""
        return self.adapter_graphs.parts(self._calls.adapter)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._run(args, kwargs)

    def run_submodel(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return self._run(args, kwargs, path)

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """As a call, with the same graph run operator by operator. Later calls are compiled as ever."""
        return self._run(args, kwargs, compiled=False)

    @torch.compiler.disable  # type: ignore[untyped-decorator] # compiled already: torch.compile(qmodel) leaves it as it is
    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        path: str = WHOLE,
        compiled: bool = True,
    ) -> Any:
        return self._calls.run(args, kwargs, path, compiled=compiled)

    @property
    def all_programs(self) -> list[Programs]:
        """Of the whole model, and of its backbone and its encoder where they were ever called, for adapters of each shape."""
        return list(self.adapter_graphs)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        self.adapter_graphs.use(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.adapter_graphs.forget_unused()

    @property
    def memory_budget(self) -> int | float | None:
        """What a training step may hold from forward to backward: bytes, a fraction, or None (as much as is free).

        Assigning another one decides anew, and compiles what was not needed before.
        """
        return self.programs.memory_budget

    @memory_budget.setter
    def memory_budget(self, value: int | float | str | None) -> None:
        value = check_memory_budget(value, self.programs.backend)
        for programs in self.all_programs:
            programs.memory_budget = value

    @property
    def cuda_graphs(self) -> bool:
        """Whether launches of blocks are recorded and replayed: ``transform`` says when that is worth it.

        Assigning False gives up what was recorded, and its memory.
        """
        return self.programs.cuda_graphs

    @cuda_graphs.setter
    def cuda_graphs(self, value: bool) -> None:
        value = check_cuda_graphs(value, self.programs.backend, self.base.device)
        for programs in self.all_programs:
            programs.cuda_graphs = value

    def set_gradient_checkpointing(self, enable: bool) -> None:
        """transformers' name for a memory budget of 0.0; disabling it brings back the budget that was there."""
        if enable and self.programs.backend == "eager":
            warnings.warn(
                'gradient checkpointing is left out: backend "eager" computes nothing again',
                stacklevel=users_stacklevel(),
            )
        elif enable and self._budget_before is None:
            self._budget_before = (self.memory_budget,)
            self.memory_budget = 0.0
        elif not enable and self._budget_before is not None:
            (self.memory_budget,), self._budget_before = self._budget_before, None

    # -- the graph --------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph of the first capture, before compilation. ``qlora_fx.graph_text`` prints it.

        Its placeholders with ``meta["stored"]`` are the parameters, by store key.
        """
        several: list[Programs] = [self.programs, *self.adapter_graphs]
        return next(gm for programs in several for gm in programs.graphs.values())

    @property
    def graph_modules(self) -> dict[str, fx.GraphModule]:
        """Every graph that was captured for adapters like the active one, or for rows with adapters of their own, by mode and
        arguments."""
        several = [
            (WHOLE, self.programs),
            *self.submodels.items(),
            *self.adapter_graphs.of_rows.items(),
        ]
        return {
            f"{path} {signature}".strip(): gm
            for path, programs in several
            for signature, gm in programs.graphs.items()
        }

    def explain(self) -> Explanation:
        """What was quantized and adapted, what was not, and why."""
        return explain(self.base, self._compute)

    def saved_activations(self, *, batch_size: int, sequence_length: int) -> Activations:
        """See ``qlora_fx.saved_activations``."""
        return saved_activations(
            self.programs, batch_size=batch_size, sequence_length=sequence_length
        )

    # -- training ---------------------------------------------------------------------------------

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``(name, parameter)`` of all that trains: every ``lora_A`` and ``lora_B``, and what ``bias`` and
        ``modules_to_save`` of the ``LoraConfig`` add."""
        return iter(self.named_adapters.tensors[self.named_adapters.active].items())

    def paged_optimizer(
        self,
        lr: float,
        *,
        optimizer: str = "PagedAdamW32bit",
        weight_decay: float = 0.0,
        params: Iterable[Any] | None = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """bitsandbytes' paged optimizer over the adapter parameters.

        They are updated by the million, not one by one, as in every optimizer of bitsandbytes' (``update_together``).

        Args:
            lr: learning rate. QLoRA uses 2e-4 up to 13B parameters, 1e-4 above.
            optimizer: ``PagedAdamW32bit``, ``PagedAdamW8bit``, ``PagedLion``, or another paged one by name.
            weight_decay: decoupled weight decay; 0 as in QLoRA.
            params: adapter parameters, or group dicts of them. Default: all.
            options: passed on to bitsandbytes (``betas``, ``eps``, ...).

        Raises:
            ConfigError: unknown optimizer, or a parameter that is no adapter of this model.
        """
        adapters = dict(self.adapter_parameters())
        groups = check_groups(adapters.values() if params is None else params, adapters)
        return adapter_optimizer(groups, optimizer, lr, weight_decay, options)

    # -- the base ---------------------------------------------------------------------------------

    def save_quantized(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write the base in 4 bits: an ordinary transformers + bitsandbytes checkpoint, without the adapter.

        Where bitsandbytes' format cannot say what the model holds (experts or embeddings in 4 bits), only qlora_fx
        loads what is written, and a warning says so (``qlora_fx.checkpoints.save``). The tokenizer that lies
        beside the original is copied. The folder appears whole or not at all; files of others in it stay.

        Args:
            folder: a new folder, or one that is written over.
            max_shard_size: bytes of tensors per file, or ``"5GB"``; more are sharded with an index.

        Raises:
            CheckpointError: it cannot be written; what was there is as it was.
        """
        write_quantized(self.base, folder, parse_size(max_shard_size, "max_shard_size"))

    def merge(
        self,
        folder: str | os.PathLike[str] | None,
        mode: str = "dequantized",
        *,
        base: str | os.PathLike[str] | None = None,
        sample: Any = None,
        max_shard_size: int | str = "5GB",
    ) -> MergeReport:
        """Write an ordinary checkpoint with the adapter merged into the weights.

        Measures first (returned, and logged on ``qlora_fx`` at level info): each weight's relative error beside what
        was trained, and how far the logits move. Then writes tensor by tensor; the folder appears whole or not at all.

        Args:
            folder: a new folder, or one that is written over; None only measures.
            mode: "dequantized": the values that 4 bits stand for, plus the adapter: what was trained. "base16": the
                original weights plus the adapter. "requantized": the first in 4 bits again, as ``save_quantized``.
            base: the original checkpoint for "base16". Default: where this model was loaded from.
            sample: text (with the tokenizer beside the checkpoint), a dict of the model's arguments, or False for
                none. Default: a paragraph, or random tokens where there is no tokenizer.
            max_shard_size: as in ``save_quantized``.

        Raises:
            ConfigError: an unknown mode, no original checkpoint, or an adapted weight that others read too.
            InputError: there is no sample and none can be made.
            CheckpointError: the original is of another model, or the folder cannot be written.
        """
        with self._evaluating():
            return merge(
                self.base,
                self,
                folder,
                mode=mode,
                original=base,
                sample=sample,
                max_shard_size=max_shard_size,
            )

    # -- generation -------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` in eval mode.

        A token computes its keys and values once, and all later ones read them; an encoder runs once. Models whose
        cache is of another kind (linear attention, state spaces), and calls with ``use_cache=False``, compute the
        whole prefix again for each token.

        Args:
            args, kwargs: transformers'; and PEFT's ``adapter_names``, the adapter of each row of the batch, ``"__base__"`` for
                none. Beams and further sequences of a row have its adapter.
        """
        if not hasattr(self.twin, "generate"):
            raise InputError(f"{self.base.skeleton.name} has no generate")
        kwargs.pop(
            "labels", None
        )  # Seq2SeqTrainer hands its whole batch on; tokens are generated without
        if not caches(self.base.skeleton.model):
            kwargs["use_cache"] = False
        names = kwargs.pop("adapter_names", None)
        with self._evaluating(), self._calls.rows_with(names), torch.no_grad():
            return self.twin.generate(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode; afterwards the mode is as it was."""
        if not self.twin.training:
            yield
            return
        self.eval()
        try:
            yield
        finally:
            self.train()
