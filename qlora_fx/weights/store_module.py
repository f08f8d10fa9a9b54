"""What ``QLoRAModel`` is as an ``nn.Module``: its tensors are a store's, and stay where and as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn, Self, SupportsIndex

import torch
from torch import nn

from ..errors import ConfigError, ModelError
from .base import Base


class StoreModule(nn.Module):
    """A module over the tensors of a base, which captured graphs read too: it can neither be moved nor copied.

    Args:
        base: the model as data.
    """

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.base = base

    def read_store(self) -> None:
        """Take the store's tensors as this module's own parameters and buffers.

        The last thing an ``__init__`` does: from then on attributes named as a child of the model cannot be set.
        """
        for members in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[members] = self.base.store.root.__dict__[members]

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        return self.base.skeleton.model.config

    @property
    def generation_config(self) -> Any:
        """The Hugging Face generation config."""
        return self.base.skeleton.model.generation_config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of activations and logits."""
        return self.base.activation_dtype

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode; afterwards the mode is as it was."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """``.to``, ``.half``, ``.cuda``: allowed where they change nothing, else refused."""
        for name, tensor in self.base.store.items():
            new = fn(tensor)
            if new.device != tensor.device or new.dtype != tensor.dtype:
                raise ConfigError(
                    f"{name} cannot move from {tensor.dtype} on {tensor.device} to {new.dtype} on {new.device}: "
                    "the captured graph is for that dtype and device. Move the model, then transform it"
                )
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
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

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """``copy.deepcopy``, ``pickle`` and ``torch.save`` of the model: its compiled graphs cannot be copied."""
        raise ModelError(
            "a QLoRAModel cannot be copied or pickled: its compiled graphs read one set of tensors. To keep it, "
            "save_pretrained(folder) writes the adapter and save_quantized(folder) the base, which "
            "qlora_fx.from_pretrained loads; for a second model, transform a copy of the dense one. As a reference "
            "without its adapter, the same model serves: with qmodel.disable_adapter()"
        )
