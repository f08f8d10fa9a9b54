"""QLoRAModel: what ``transform`` returns. Behaves as the user's model; its adapters are what trains."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .adapters.peft_format import apply_adapter, check_saved, peft_names, saved_config
from .capture.arguments import (
    bind,
    check_call,
    is_paired,
    signature_key,
    vocabulary_size,
    without_cache,
)
from .capture.signature import Signature, graph_title, skips_logits
from .capture.skeleton import Blueprint, Capture
from .checkpoints.locate import Source
from .compiler import pipeline
from .config import Config
from .errors import CaptureError, ConfigError, InputError
from .explain import Explanation, Row
from .generate import stand_in
from .memory.recompute import Budget, check_budget
from .passes.adapt import is_adapter_key, lora_keys
from .passes.graph.nodes import sites
from .passes.graph.site import Site
from .passes.lower import lower
from .runtime import adapter_files as checkpoint
from .runtime.checkpoint_writer import parse_size
from .runtime.fastest_dtype import ComputeDtype
from .runtime.optimizer import Flat, paged_optimizer
from .runtime.parameter_store import Store
from .runtime.program import DoesNotFit, Program

if TYPE_CHECKING:
    from .merging.merge import MergeReport


class QLoRAModel(nn.Module):
    """A transformed model.

    Call it with the model's own arguments; it returns the model's own output class. Each new set of
    arguments (names, ranks, dtypes, flags) is captured and compiled on first use; all of them read the
    same parameters. Batch and sequence are free: other sizes neither capture nor compile again.

    Made by :func:`qlora_fx.transform`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        config: Config,
        compute: ComputeDtype,
        activation_dtype: torch.dtype,
        backend: str,
    ) -> None:
        super().__init__()
        self._blueprint = blueprint
        self._config = config
        self._compute = compute
        self._activation_dtype = activation_dtype
        self._backend = backend
        self._store = Store(self)
        self._sites: dict[str, Site] = {}
        self._dense_bytes: dict[str, int] = {}
        self._programs: dict[Signature, list[Program]] = {}
        self._graphs: dict[Signature, fx.GraphModule] = {}
        self._budgets: dict[Program, Budget] = {}
        self._memory_budget: int | float | None = None
        self._adapter_enabled = True
        self._flat: Flat | None = None
        self._source: Source | None = None
        self._vocabulary = vocabulary_size(blueprint.model)

    # -- the model it stands for ------------------------------------------------------------------

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        return self._blueprint.model.config

    @property
    def generation_config(self) -> Any:
        return self._blueprint.model.generation_config

    @property
    def device(self) -> torch.device:
        return self._blueprint.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and logits."""
        return self._activation_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which the linears multiply."""
        return self._compute.dtype

    @property
    def lora_config(self) -> Any:
        """The ``peft.LoraConfig`` in force."""
        return self._config.lora

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward.

        In training mode, when ``labels`` are given, the loss is computed without its logits and ``logits`` is
        None; ``return_logits=True`` asks for them. In eval mode they are there unless it is False.

        Raises:
            InputError: an unknown argument, or tensors whose shapes or devices do not fit.
            CaptureError: a new set of arguments could not be captured.
        """
        wanted = kwargs.pop("return_logits", None)
        values = bind(self._blueprint.signature, args, kwargs)
        if values.get("use_cache"):
            raise InputError(
                "use_cache=True is not supported; accepted: False (recompute the prefix)"
            )
        values = without_cache(self._blueprint.signature, values)
        if values.get("return_dict") is True:  # the default; not worth a capture of its own
            del values["return_dict"]
        count = values.get("num_items_in_batch")
        if isinstance(count, int):
            # It differs from step to step: an input of the graph, not a constant in it.
            values["num_items_in_batch"] = torch.tensor(count, device=self.device)
        check_call(values, self.device, self._vocabulary, is_paired(self._blueprint.model))
        logits = not skips_logits(self.training, values) if wanted is None else bool(wanted)
        key = Signature(self.training, self._adapter_enabled, logits, signature_key(values))
        misfits = []
        for program in self._programs.get(key, ()):
            try:
                return program(values)
            except DoesNotFit as error:
                misfits.append(error)
        if misfits:
            warnings.warn(
                f"capturing {type(self._blueprint.model).__name__} again, its code depends on the shape: "
                f"{misfits[0]}",
                stacklevel=2,
            )
        program = self._capture(key, values)
        try:
            return program(values)
        except DoesNotFit as error:
            raise InputError(
                f"the tensors of this call do not fit each other: {misfits[0] if misfits else error}"
            ) from None

    def _capture(self, key: Signature, values: Mapping[str, Any]) -> Program:
        """Capture a further signature over the same parameters."""
        config = self._config.with_(
            training=key.training,
            adapter=key.adapter,
            return_logits=key.logits,
            decided=self._sites,
        )
        try:
            capture = self._blueprint.capture(
                values, training=self.training, dtype=self._activation_dtype
            )
        except CaptureError as error:
            if key in self._programs:
                raise InputError(
                    f"the tensors of this call do not fit each other: {error}"
                ) from error
            raise
        result = pipeline.run(capture.gm, config, title=graph_title(self.training, values))
        return self._install(key, capture, result)

    def _install(self, key: Signature, capture: Capture, result: pipeline.Result) -> Program:
        for name, tensor in capture.constants.items():
            self._store.tensors[name] = tensor.to(self.device)
        gm = result.gm
        program = Program(
            lower(gm, backend=self._backend),
            [self._store[n.meta["stored"]] for n in gm.graph.nodes if "stored" in n.meta],
            [(n.meta["input"], n.meta["val"]) for n in gm.graph.nodes if "input" in n.meta],
            capture.guards,
            capture.out_spec,
        )
        self._budgets[program] = Budget(program.run, self._memory_budget, self.device)
        program.prepare = self._budgets[program].prepare
        self._programs.setdefault(key, []).append(program)
        self._graphs.setdefault(key, gm)
        return program

    @property
    def memory_budget(self) -> int | float | None:
        """What a training step may hold from forward to backward: bytes, a fraction, or None (as much as is free).

        Assigning another one decides anew, and compiles what was not needed before.
        """
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, value: Any) -> None:
        self._memory_budget = check_budget(value)
        for budget in self._budgets.values():
            budget.ask(self._memory_budget)

    # -- the graph --------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph of the first capture, before compilation. ``qlora_fx.graph_text`` prints it.

        Its placeholders with ``meta["stored"]`` are the parameters, by store key.
        """
        return next(iter(self._graphs.values()))

    @property
    def graph_modules(self) -> dict[str, fx.GraphModule]:
        """Every captured graph, by mode and arguments."""
        return {str(key): gm for key, gm in self._graphs.items()}

    def explain(self) -> Explanation:
        """What was quantized and adapted, what was not, and why."""
        flops = sum(site.flops for site in self._sites.values())
        rows = [self._row(site, site.flops / max(flops, 1)) for site in self._sites.values()]
        counted = {site.weight for site in self._sites.values()}
        counted |= {
            f"{w}.{part}" for w in counted for part in ("absmax", "nested_absmax", "offset")
        }
        other = sum(
            t.nbytes for k, t in self._store.items() if k not in counted and not is_adapter_key(k)
        )
        q = self._config.quantization
        lora = self._config.lora
        notes = [
            f"storage: {q.quant_type}, blocksize {q.blocksize}, "
            f"{'double' if q.double_quant else 'single'} quantization, held as {str(q.storage_dtype).removeprefix('torch.')}",
            f"compute: {str(self._compute.dtype).removeprefix('torch.')} ({self._compute.reason}); "
            f"activations {str(self.dtype).removeprefix('torch.')}",
            f"adapters: float32, r={lora.r}, lora_alpha={lora.lora_alpha}, dropout {lora.lora_dropout}",
        ]
        return Explanation(
            f"{type(self._blueprint.model).__name__} as qlora_fx runs it", rows, other, notes
        )

    def _row(self, site: Site, flops_share: float) -> Row:
        lora = lora_keys(site) if site.adapt else ()
        return Row(
            name=site.name,
            op=site.op,
            shape=site.shape,
            flops_share=flops_share,
            quantized=site.quantize,
            adapted=site.adapt,
            reason=site.reason,
            bytes_before=self._dense_bytes.get(site.weight, 0),
            bytes_after=self._store.bytes_of(site.weight) if site.weight else 0,
            adapter_bytes=sum(self._store[k].nbytes for k in lora if k in self._store),
            weight=site.weight,
        )

    # -- training ---------------------------------------------------------------------------------

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``(name, parameter)`` of every ``lora_A`` and ``lora_B``: all that trains."""
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
            params: parameters or group dicts, each of them an adapter parameter. Default: all of them as
                views of one buffer, updated in pieces of 1M elements, so that a step is a few calls and the
                state is large enough to be paged; ``optimizer.param_groups[0]["params"]`` are the pieces.
            options: passed on to bitsandbytes (``betas``, ``eps``, ...).

        Raises:
            ConfigError: unknown optimizer, or a parameter that is no adapter of this model.
        """
        if params is None:
            if self._flat is None:
                self._flat = Flat(p for _, p in self.adapter_parameters())
            return self._bitsandbytes(self._flat, optimizer, lr, weight_decay, options)
        ours = {id(p): n for n, p in self.adapter_parameters()}
        groups = list(params)
        flat: list[Any] = []
        for i, group in enumerate(groups):
            if isinstance(group, dict):
                members = group["params"]
                members = [members] if isinstance(members, torch.Tensor) else list(members)
                groups[i] = {**group, "params": members}
                flat += members
            else:
                flat.append(group)
        for p in flat:
            if id(p) not in ours:
                what = f"a tensor {list(p.shape)}" if isinstance(p, torch.Tensor) else repr(p)
                raise ConfigError(
                    f"{what} is not an adapter parameter of this model; accepted: parameters from "
                    "qmodel.adapter_parameters()"
                )
        return self._bitsandbytes(groups, optimizer, lr, weight_decay, options)

    def _bitsandbytes(
        self, params: Any, name: str, lr: float, weight_decay: float, options: dict[str, Any]
    ) -> torch.optim.Optimizer:
        try:
            return paged_optimizer(params, name, lr=lr, weight_decay=weight_decay, **options)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the quantized model without its adapter (the reference model of preference training)."""
        before, self._adapter_enabled = self._adapter_enabled, False
        try:
            yield
        finally:
            self._adapter_enabled = before

    def _apply(self, fn: Any, recurse: bool = True) -> QLoRAModel:
        """``.to``, ``.half``, ``.cuda``: allowed where they change nothing, else refused."""
        for name, tensor in self._store.items():
            new = fn(tensor)
            if new.device != tensor.device or new.dtype != tensor.dtype:
                raise ConfigError(
                    f"{name} cannot move from {tensor.dtype} on {tensor.device} to {new.dtype} on {new.device}: "
                    "the captured graph is for that dtype and device. Move the model, then transform it"
                )
        return self

    def to(self, *args: Any, **kwargs: Any) -> QLoRAModel:
        """Accepts the device and dtype the model already has; refuses others (see ``_apply``)."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and torch.device(device).type != self.device.type:
            raise ConfigError(
                f"cannot move from {self.device} to {device}: move the model, then transform it"
            )
        if dtype is not None and dtype != self.dtype:
            raise ConfigError(
                f"cannot cast from {self.dtype} to {dtype}: pass compute_dtype= to transform"
            )
        return self

    # -- adapters ---------------------------------------------------------------------------------

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """``lora_A`` and ``lora_B``, float32, under PEFT's saved keys and in its shapes.

        ``[r, in]`` and ``[out, r]``; of experts ``[experts * r, in]`` and ``[out, r * experts]``.
        """
        return {k: p.detach() for k, p in self._adapter_by_peft_name().items()}

    def _adapter_by_peft_name(self) -> dict[str, nn.Parameter]:
        names = peft_names(self._sites, self._blueprint.keys)
        return {checkpoint.PREFIX + names[n]: p for n, p in self.adapter_parameters()}

    def load_adapter_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy adapter values in.

        Raises:
            AdapterError: a key is missing, unknown, or of another shape; nothing was changed.
        """
        apply_adapter(self._adapter_by_peft_name(), state)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT does."""
        config = saved_config(self._config.lora, self._sites, self.config)
        checkpoint.save(folder, self.adapter_state_dict(), config)

    def load_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Load an adapter folder written here or by PEFT.

        Raises:
            AdapterError: it cannot be read or does not fit this model's adapter; nothing was changed.
        """
        tensors, config = checkpoint.load(folder)
        check_saved(config, self._sites, os.fspath(folder))
        self.load_adapter_state_dict(tensors)

    # -- the base ---------------------------------------------------------------------------------

    def save_quantized(
        self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write the base in 4 bits: an ordinary transformers + bitsandbytes checkpoint, without the adapter.

        Where bitsandbytes' format cannot say what the model holds (experts or embeddings in 4 bits), a format
        that only qlora_fx loads is written, and a warning says so (``qlora_fx.checkpoints.save`` describes it). A tokenizer
        in the folder that the model came from is copied. The folder appears whole or not at all; files of
        others in it stay.

        Args:
            folder: a new folder, or one that is written over.
            max_shard_size: bytes of tensors per file, or ``"5GB"``; more are sharded with an index.

        Raises:
            CheckpointError: it cannot be written; what was there is as it was.
        """
        from .checkpoints.save import write_quantized

        write_quantized(self, folder, parse_size(max_shard_size))

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

        Measures first (logged at level info on the logger ``qlora_fx``, and returned): for each weight the relative
        error beside what was trained, and how far the logits of the merged model are from this one's. Then writes
        tensor by tensor. The folder appears whole or not at all.

        Args:
            folder: a new folder, or one that is written over; None only measures.
            mode: "dequantized": the values that 4 bits stand for, plus the adapter: what was trained. "base16": the
                original weights plus the adapter: nearer to the original model, not what was trained.
                "requantized": the first in 4 bits again, saved as ``save_quantized`` does.
            base: the original checkpoint for "base16". Default: where this model was loaded from.
            sample: text (with the tokenizer beside the checkpoint), a dict of the model's arguments, or False for
                none. Default: a paragraph, or random tokens where there is no tokenizer.
            max_shard_size: as in ``save_quantized``.

        Raises:
            ConfigError: an unknown mode, no original checkpoint, or an adapted weight that others read too.
            InputError: there is no sample and none can be made.
            CheckpointError: the original is of another model, or the folder cannot be written.
        """
        from .merging.merge import merge

        return merge(
            self, folder, mode=mode, base=base, sample=sample, max_shard_size=max_shard_size
        )

    # -- generation -------------------------------------------------------------------------------

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` over this model, without a key/value cache.

        Runs in eval mode under ``no_grad`` and puts the mode back. Each new token computes the whole prefix
        again.
        """
        kwargs["use_cache"] = False
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return stand_in(self).generate(*args, **kwargs)
        finally:
            self.train(was_training)


def decide(flat: fx.GraphModule) -> dict[str, Site]:
    """The verdicts of the first capture, by site name; FLOPs of a linear called several times are added up."""
    decided: dict[str, Site] = {}
    for node in sites(flat.graph):
        site: Site = node.meta["site"]
        before = decided.get(site.name)
        if before is not None:
            site = replace(before, flops=before.flops + site.flops)
        decided[site.name] = site
    return decided
