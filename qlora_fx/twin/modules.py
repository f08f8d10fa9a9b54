"""What a twin's classes do otherwise than the user's: run as a compiled program, stay in place, say what they hold.

Each class is mixed into a class of the user's (``mixed``), so that ``isinstance`` and ``type(module).__name__`` are
what they were.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, Self, SupportsIndex

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from ..runtime.parameter_store import QuantizedState
from ..weights.base import Base


class Owner(Protocol):
    """The model that a twin belongs to, as the twin's own methods need it."""

    base: Base

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def run_submodel(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def set_gradient_checkpointing(self, enable: bool) -> None: ...
    def enable_adapters(self, enable: bool) -> None: ...
    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None: ...
    def delete_adapter(self, adapter_name: str) -> None: ...


def mixed(module: nn.Module, mixin: type) -> None:
    """Make ``module`` an object of its own class with ``mixin`` before it."""
    cls = type(module)
    if (cls, mixin) not in _mixed:
        members = {"__module__": cls.__module__}
        if hasattr(mixin, "call"):
            members["forward"] = forward_like(cls, mixin.call)
        _mixed[cls, mixin] = type(cls.__name__, (mixin, cls), members)
    module.__class__ = _mixed[cls, mixin]


_mixed: dict[tuple[type, type], type] = {}


def forward_like(cls: type[nn.Module], run: Callable[..., Any]) -> Any:
    """A forward that calls ``run`` and has the signature of the class's own, which trainers and ``generate`` read."""

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return run(self, args, kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return forward


class InPlace:
    """A module over the tensors of a base, which captured graphs read too: it can neither be moved nor copied."""

    qlora_fx_owner: Owner

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """``.to``, ``.half``, ``.cuda``: allowed where they change nothing, else refused."""
        for name, tensor in self.qlora_fx_owner.base.store.items():
            new = fn(tensor)
            if new.device != tensor.device or new.dtype != tensor.dtype:
                raise ConfigError(
                    f"{name} cannot move from {tensor.dtype} on {tensor.device} to {new.dtype} on {new.device}: "
                    "the captured graph is for that dtype and device. Move the model, then transform it"
                )
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Accepts the device and dtype the model already has; refuses others (see ``_apply``)."""
        base = self.qlora_fx_owner.base
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and torch.device(device).type != base.device.type:
            raise ConfigError(
                f"cannot move from {base.device} to {device}: move the model, then transform it"
            )
        if dtype is not None and dtype != base.activation_dtype:
            raise ConfigError(
                f"cannot cast from {base.activation_dtype} to {dtype}: pass compute_dtype= to transform"
            )
        return self

    @property
    def device(self) -> torch.device:
        return self.qlora_fx_owner.base.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and logits."""
        return self.qlora_fx_owner.base.activation_dtype

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """``copy.deepcopy``, ``pickle`` and ``torch.save`` of the model: its compiled graphs cannot be copied."""
        raise ModelError(
            "a QLoRAModel cannot be copied or pickled: its compiled graphs read one set of tensors. To keep it, "
            "save_pretrained(folder) writes the adapter and save_quantized(folder) the base, which "
            "qlora_fx.from_pretrained loads; for a second model, transform a copy of the dense one. As a reference "
            "without its adapter, the same model serves: with qmodel.disable_adapter()"
        )


class Submodel(InPlace):
    """A module of the twin that is called for itself: its backbone, or its encoder."""

    qlora_fx_path: str

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.qlora_fx_owner.run_submodel(self.qlora_fx_path, args, kwargs)


class Root(InPlace):
    """The twin itself."""

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.qlora_fx_owner.run(args, kwargs)

    def _supports_mm_encoder_outputs(self) -> bool:
        """What ``generate`` asks before it calls a model's vision tower apart: here the whole model does it."""
        return False

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Elements of all parameters; those in 4 bits count as the weights that they stand for."""
        module: Any = self
        left_out = set()
        if exclude_embeddings:
            left_out = {
                id(p)
                for m in module.modules()
                if isinstance(m, nn.Embedding)
                for p in m.parameters()
            }
        counts = parameter_counts(module, self.qlora_fx_owner.base)
        return sum(
            count
            for p, count in counts
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As ``memory_budget=0.0``: only the inputs of the blocks are kept for backward."""
        self.qlora_fx_owner.set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Takes ``gradient_checkpointing_enable`` back."""
        self.qlora_fx_owner.set_gradient_checkpointing(False)

    def enable_input_require_grads(self) -> None:
        """Nothing to do: what a captured graph differentiates does not depend on its inputs."""

    def disable_input_require_grads(self) -> None:
        """Nothing to do."""


def parameter_counts(module: nn.Module, base: Base) -> list[tuple[nn.Parameter, int]]:
    """Every parameter with the number of elements that it stands for."""
    store = base.store
    shapes = {id(store[key]): torch.Size(q.shape).numel() for key, q in store.quantized.items()}
    return [(p, shapes.get(id(p), p.numel())) for p in module.parameters()]


class Quantized(QuantizedState):
    """A module whose weights are in 4 bits: they are read by compiled programs, not by the module."""

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(
            f"this {type(self).__name__}'s weights ({', '.join(self.descriptions)}) are stored quantized, and only the "
            "whole model, its backbone and its encoder are compiled to read them. Call the model itself"
        )
