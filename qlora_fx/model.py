"""QLoRAModel: what ``transform`` returns. Behaves as the user's model; its adapters are what trains."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import fx, nn

from .adapters.initialize import add_adapters
from .adapters.peft_format import apply_adapter, check_saved, peft_names, saved_config
from .capture.arguments import Call, Signature
from .checkpoints.save import write_quantized
from .compiler.compile import Prepared
from .compiler.programs import Programs
from .compiler.request import check_memory_budget
from .explain import Explanation, explain
from .generate import with_forward
from .memory.saved_activations import Activations, saved_activations
from .merging.merge import MergeReport, merge
from .optimizer import adapter_optimizer, check_groups
from .passes.adapt import is_adapter_key
from .runtime import adapter_files
from .runtime.optimizer import Flat
from .units import parse_size
from .weights.store_module import StoreModule


class QLoRAModel(StoreModule):
    """A transformed model.

    Call it with the model's own arguments; it returns the model's own output class. Each new set of
    arguments (names, ranks, dtypes, flags) is captured and compiled on first use; all of them read the
    same parameters. Batch and sequence are free: other sizes neither capture nor compile again.

    Made by :func:`qlora_fx.transform` and :func:`qlora_fx.from_pretrained`.

    Args:
        prepared: its store has all weights.

    Attributes:
        base: the model as data: its Python without weights, its verdicts, its store.
        programs: its captured graphs.
    """

    def __init__(self, prepared: Prepared) -> None:
        base = prepared.base
        super().__init__(base)
        add_adapters(base)
        self.programs = Programs(base, prepared.request.backend, prepared.request.memory_budget)
        signature = prepared.call.signature(training=True)
        self.programs.add(signature, prepared.capture, prepared.result)
        self._compute = prepared.compute
        self._adapter_enabled = True
        self._flat: Flat | None = None
        self.read_store()

    # -- the model it stands for ------------------------------------------------------------------

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the linears multiply."""
        return self._compute.dtype

    @property
    def lora_config(self) -> LoraConfig:
        """The ``peft.LoraConfig`` in force."""
        return self.base.config.lora

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward.

        In training mode, when ``labels`` are given, the loss is computed without its logits and ``logits`` is
        None; ``return_logits=True`` asks for them. In eval mode they are there unless it is False.

        Raises:
            InputError: an unknown argument, or tensors whose shapes or devices do not fit.
            CaptureError: a new set of arguments could not be captured.
        """
        return self.programs.run(*self._bound(args, kwargs))

    def run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """As a call, with the same graph run operator by operator. Later calls are compiled as ever."""
        return self.programs.run(*self._bound(args, kwargs), compiled=False)

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Call, Signature]:
        call = self.base.skeleton.bind(args, kwargs)
        self.base.skeleton.check(call)
        return call, call.signature(training=self.training, adapter=self._adapter_enabled)

    @property
    def memory_budget(self) -> int | float | None:
        """What a training step may hold from forward to backward: bytes, a fraction, or None (as much as is free).

        Assigning another one decides anew, and compiles what was not needed before.
        """
        return self.programs.memory_budget

    @memory_budget.setter
    def memory_budget(self, value: int | float | str | None) -> None:
        self.programs.memory_budget = check_memory_budget(value, self.programs.backend)

    # -- the graph --------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph of the first capture, before compilation. ``qlora_fx.graph_text`` prints it.

        Its placeholders with ``meta["stored"]`` are the parameters, by store key.
        """
        return next(iter(self.programs.graphs.values()))

    @property
    def graph_modules(self) -> dict[str, fx.GraphModule]:
        """Every captured graph, by mode and arguments."""
        return {str(signature): gm for signature, gm in self.programs.graphs.items()}

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
        return ((n, p) for n, p in self.named_parameters() if is_adapter_key(n))

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

        Args:
            lr: learning rate. QLoRA uses 2e-4 up to 13B parameters, 1e-4 above.
            optimizer: ``PagedAdamW32bit``, ``PagedAdamW8bit``, ``PagedLion``, or another paged one by name.
            weight_decay: decoupled weight decay; 0 as in QLoRA.
            params: adapter parameters, or group dicts of them. Default: all as views of one buffer, updated in
                pieces of 1M elements, large enough to be paged; ``param_groups[0]["params"]`` are the pieces.
            options: passed on to bitsandbytes (``betas``, ``eps``, ...).

        Raises:
            ConfigError: unknown optimizer, or a parameter that is no adapter of this model.
        """
        if params is not None:
            groups = check_groups(params, dict(self.adapter_parameters()))
            return adapter_optimizer(groups, optimizer, lr, weight_decay, options)
        if self._flat is None:
            self._flat = Flat(p for _, p in self.adapter_parameters())
        return adapter_optimizer(self._flat, optimizer, lr, weight_decay, options)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the quantized model without its adapter (the reference model of preference training)."""
        before, self._adapter_enabled = self._adapter_enabled, False
        try:
            yield
        finally:
            self._adapter_enabled = before

    # -- adapters ---------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """``lora_A`` and ``lora_B``, float32, under PEFT's saved keys and in its shapes.

        ``[r, in]`` and ``[out, r]``; of experts ``[experts * r, in]`` and ``[out, r * experts]``.
        """
        return {k: p.detach() for k, p in self.adapter_by_peft_name().items()}

    def adapter_by_peft_name(self) -> dict[str, nn.Parameter]:
        base = self.base
        names = peft_names(base.adapter, base.sites, base.skeleton.keys, base.trained)
        return {adapter_files.PREFIX + names[n]: p for n, p in self.adapter_parameters()}

    def load_adapter_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy adapter values in.

        Raises:
            AdapterError: a key is missing, unknown, or of another shape; nothing was changed.
        """
        apply_adapter(self.adapter_by_peft_name(), state)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT does."""
        config = saved_config(self.base)
        adapter_files.save(folder, self.adapter_state_dict(), config)

    def load_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Load an adapter folder written here or by PEFT.

        Raises:
            AdapterError: it cannot be read or does not fit this model's adapter; nothing was changed.
        """
        tensors, config = adapter_files.load(folder)
        check_saved(config, self.base.sites, os.fspath(folder))
        self.load_adapter_state_dict(tensors)

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
        """transformers' ``generate`` in eval mode, without a key/value cache: a token computes its whole prefix again."""
        kwargs["use_cache"] = False
        model = self.base.skeleton.model
        generator = with_forward(model, self, device=self.device, dtype=self.dtype)
        with self._evaluating(), torch.no_grad():
            return generator.generate(*args, **kwargs)
