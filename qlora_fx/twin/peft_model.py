"""A ``PeftModel`` over a base: what transformers, TRL and accelerate ask of one, answered from the store."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..adapters.peft_format import apply_adapter, check_saved, peft_names, saved_config
from ..errors import AdapterError, ConfigError, ModelError
from ..runtime import adapter_files
from ..transformers_internals import BaseTunerLayer, ModulesToSaveWrapper
from ..weights.base import Base
from .build import build_twin, hide_adapter, show_adapter
from .modules import InPlace, parameter_counts
from .named_adapters import DEFAULT, NamedAdapters
from .tuner import Tuner

SAVING: dict[str, tuple[Any, ...]] = {
    "safe_serialization": (True, None),
    "save_embedding_layers": ("auto", False),
    "path_initial_model_for_weight_conversion": (None,),
}
LOADING: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (True, False),
    "autocast_adapter_dtype": (True, False),
    "ephemeral_gpu_offload": (False,),
    "torch_device": (None,),
}
"""Arguments of PEFT's ``save_pretrained`` and ``load_adapter`` and the values of them that ask for nothing else."""


def check_arguments(given: Mapping[str, Any], accepted: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise for an argument that would be ignored.

    Raises:
        ConfigError: naming it and what is accepted.
    """
    for name, value in given.items():
        if name not in accepted:
            raise ConfigError(f"{name}={value!r}; accepted: {', '.join(accepted)}")
        if value not in accepted[name]:
            values = " or ".join(map(repr, accepted[name]))
            raise ConfigError(f"{name}={value!r}; accepted: {values}")


class StorePeftModel(InPlace, PeftModel):  # type: ignore[misc]
    """PEFT's side of a ``QLoRAModel``: names, adapters by name, folders, counts.

    ``base_model.model`` is an object of the user's own class (``build_twin``); its parameters have PEFT's names.

    Args:
        base: all weights and the adapter are in its store.
    """

    def __init__(self, base: Base) -> None:
        nn.Module.__init__(self)
        self.__dict__["qlora_fx_owner"] = self
        self.named_adapters = NamedAdapters(base)
        self.active_adapter = DEFAULT
        self.peft_type = base.config.lora.peft_type
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._peft_config = None
        self._adapters_disabled = False
        self.base_model = Tuner(build_twin(base, self), base.config.lora, self)
        show_adapter(self.twin, base, self.named_adapters.tensors[DEFAULT], DEFAULT)

    @property
    def base(self) -> Base:
        """The model as data, with the adapter that is used."""
        return self.named_adapters.bases[self.named_adapters.active]

    @property
    def twin(self) -> Any:
        """The object of the user's own class."""
        return self.base_model.model

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        return self.base.skeleton.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward.

        In training mode, when ``labels`` are given, the loss is computed without its logits and ``logits`` is
        None; ``return_logits=True`` asks for them. In eval mode they are there unless it is False.

        Raises:
            InputError: an unknown argument, or tensors whose shapes or devices do not fit.
            CaptureError: a new set of arguments could not be captured.
        """
        return self.twin(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As every module has it. PyTorch's takes milliseconds a step to name what it finds."""
        found, modules = {id(self)}, [self]
        for module in modules:
            for p in module._parameters.values():
                if p is not None and p.grad is not None:
                    if set_to_none:
                        p.grad = None
                    else:
                        p.grad.requires_grad_(False).zero_()
            for child in module._modules.values():
                if child is not None and id(child) not in found:
                    found.add(id(child))
                    modules.append(child)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def run_submodel(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError

    def set_gradient_checkpointing(self, enable: bool) -> None:
        raise NotImplementedError

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(
            "qlora_fx.from_pretrained(path, lora=...) loads a model; qmodel.load_adapter(folder) an adapter into it"
        )

    # -- adapters by name -------------------------------------------------------------------------

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Run the quantized model without its adapter (the reference model of preference training)."""
        before = self._adapters_disabled
        self.enable_adapters(False)
        try:
            yield
        finally:
            self.enable_adapters(not before)

    @property
    def adapters_disabled(self) -> bool:
        """Whether the quantized model runs without its adapter."""
        return self._adapters_disabled

    def enable_adapters(self, enable: bool) -> None:
        """With or without the adapter from now on."""
        self._adapters_disabled = not enable
        for module in self.twin.modules():
            if isinstance(module, ModulesToSaveWrapper | BaseTunerLayer):
                module._disable_adapters = not enable

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """A further adapter, newly initialized; ``set_adapter`` makes it the one that is used.

        Args:
            adapter_name: its name, an identifier.
            peft_config: its ranks, scalings and dropout may be its own, and it may adapt less than the first adapter. Where they
                are the first adapter's, both run the same compiled programs.
            low_cpu_mem_usage, autocast_adapter_dtype: PEFT's; without effect, for adapters are float32.

        Raises:
            ConfigError: the name is taken, it adapts what the first adapter does not, or biases train.
        """
        new = self.named_adapters.add(adapter_name, peft_config)
        self.base_model.peft_config[adapter_name] = peft_config
        base = self.named_adapters.bases[adapter_name]
        show_adapter(self.twin, base, new, adapter_name)
        for tensor in new.values():
            tensor.requires_grad_(False)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Use the adapter of that name from now on, and train it alone (unless ``inference_mode``).

        Nothing is copied; calls are captured and compiled anew where sites, ranks, scalings or dropout are those of no adapter
        that was used before.

        Raises:
            AdapterError: there is none.
        """
        self.named_adapters.active = self.named_adapters.check(adapter_name)
        self.active_adapter = self.base_model.active_adapter = adapter_name
        for module in self.twin.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module._active_adapter = [adapter_name]
            elif isinstance(module, BaseTunerLayer):
                module._active_adapter = adapter_name
        for name, tensors in self.named_adapters.tensors.items():
            for tensor in tensors.values():
                tensor.requires_grad_(name == adapter_name and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget the adapter of that name.

        Raises:
            ConfigError: it is the one that is used, or "default", which the graphs were captured with.
        """
        self.named_adapters.check(adapter_name)
        if adapter_name in (DEFAULT, self.named_adapters.active):
            raise ConfigError(
                f"adapter {adapter_name!r} cannot be deleted; accepted: one that is neither active nor {DEFAULT!r}"
            )
        self.named_adapters.delete(adapter_name)
        del self.base_model.peft_config[adapter_name]
        hide_adapter(self.twin, adapter_name)

    # -- values and folders -----------------------------------------------------------------------

    def adapter_by_peft_name(self, adapter_name: str | None = None) -> dict[str, nn.Parameter]:
        """The parameters that train, by PEFT's saved key. Default: of the active adapter."""
        named = self.named_adapters
        name = named.check(adapter_name or named.active)
        tensors, base = named.tensors[name], named.bases[name]
        paths = peft_names(base.adapter, base.sites, base.skeleton.keys, base.trained)
        return {adapter_files.PREFIX + path: tensors[key] for key, path in paths.items()}

    def adapter_state_dict(self, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
        """``lora_A`` and ``lora_B``, float32, under PEFT's saved keys and in its shapes.

        ``[r, in]`` and ``[out, r]``; of experts ``[experts * r, in]`` and ``[out, r * experts]``.
        """
        return {k: p.detach() for k, p in self.adapter_by_peft_name(adapter_name).items()}

    def load_adapter_state_dict(
        self, state: Mapping[str, torch.Tensor], adapter_name: str | None = None
    ) -> None:
        """Copy adapter values in.

        Raises:
            AdapterError: a key is missing, unknown, or of another shape; nothing was changed.
        """
        apply_adapter(self.adapter_by_peft_name(adapter_name), state)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: Any = None,
        **others: Any,
    ) -> None:
        """Write ``adapter_model.safetensors``, ``adapter_config.json`` and a model card, as PEFT does.

        Args:
            save_directory: the adapter "default" goes there, others into a folder of their name in it.
            selected_adapters: names; default: all.
            is_main_process: False writes nothing.
            state_dict: not read: what is written is this model's adapter.
            others: PEFT's, where they change nothing here.

        Raises:
            ConfigError: an argument of PEFT's that would change what is written.
        """
        check_arguments(others, SAVING)
        names = [
            self.named_adapters.check(name)
            for name in selected_adapters or self.named_adapters.tensors
        ]
        if not is_main_process:
            return
        for name in names:
            folder = Path(save_directory) / ("" if name == DEFAULT else name)
            config = saved_config(self.named_adapters.bases[name])
            adapter_files.save(folder, self.adapter_state_dict(name), config)
        if isinstance(self.twin, PreTrainedModel):
            self.create_or_update_model_card(os.fspath(save_directory))

    def load_adapter(
        self,
        folder: str | os.PathLike[str],
        adapter_name: str | None = None,
        is_trainable: bool = False,
        **others: Any,
    ) -> None:
        """Load an adapter folder written here or by PEFT.

        Args:
            folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
            adapter_name: which adapter takes the values; a new name makes a new one, as the folder's config says. Default: the
                active one.
            is_trainable: as in PEFT; what trains is decided by ``set_adapter``.
            others: PEFT's, where they change nothing here.

        Raises:
            ConfigError: an argument of PEFT's that would change what is loaded.
            AdapterError: it cannot be read or does not fit this model's adapter; nothing was changed.
        """
        check_arguments(others, LOADING)
        tensors, config = adapter_files.load(folder)
        named = self.named_adapters
        if adapter_name is not None and adapter_name not in named.tensors:
            try:
                self.add_adapter(adapter_name, LoraConfig.from_peft_type(**config))
            except (ConfigError, TypeError, ValueError) as error:
                raise AdapterError(f"{os.fspath(folder)}: {error}") from error
            try:
                self.load_adapter_state_dict(tensors, adapter_name)
            except Exception:
                self.delete_adapter(adapter_name)
                raise
            return
        sites = named.bases[adapter_name or named.active].sites
        check_saved(config, sites, os.fspath(folder))
        self.load_adapter_state_dict(tensors, adapter_name)

    # -- counts -----------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters; those in 4 bits count as the weights that they stand for."""
        counts = parameter_counts(self, self.base)
        return sum(n for p, n in counts if p.requires_grad), sum(n for _, n in counts)
