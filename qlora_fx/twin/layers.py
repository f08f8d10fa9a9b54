"""What stands where PEFT has a LoRA layer: the adapter's tensors beside the layer that they adapt."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from ..errors import ModelError
from ..runtime.parameter_store import Node
from ..transformers_internals import BaseTunerLayer


class AdaptedLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """Holds ``base_layer`` and, by adapter name, the adapter's tensors (``lora_A.default.weight``); computes nothing.

    Args:
        base_layer: the module, or the next wrapper of one that has several adapted parameters.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.adapter_layer_names: tuple[str, ...] = ()
        self.base_layer = base_layer

    def hold(self, role: str, name: str, leaf: str, tensor: nn.Parameter) -> None:
        """Hold a tensor of the adapter ``name`` for ``role``, such as ``lora_A``, as ``leaf``.

        That is ``weight`` but for parameters that PEFT has no adapter for, of which there may be several in a module.
        """
        if role not in self._modules:
            self.add_module(role, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, role)
        holders: Any = self.get_submodule(role)
        if name not in holders:
            holders[name] = Node()
        holders[name].register_parameter(leaf, tensor)

    def forget(self, name: str) -> None:
        """Drop the tensors of the adapter ``name``."""
        for role in self.adapter_layer_names:
            self.get_submodule(role)._modules.pop(name, None)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ModelError(
            f"this {type(self.get_base_layer()).__name__} and its adapter are part of compiled programs; only the whole "
            "model, its backbone and its encoder can be called. Call the model itself"
        )

    def __getattr__(self, name: str) -> Any:
        """The layer's own attributes (``in_features``, ...)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)
