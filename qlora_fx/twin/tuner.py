"""What stands where PEFT has its ``LoraModel``: between the ``PeftModel`` and the user's model."""

from __future__ import annotations

from typing import Any, NoReturn

from peft import LoraConfig
from torch import nn

from ..errors import ModelError
from ..transformers_internals import LoraModel
from .modules import Owner


class Tuner(LoraModel):  # type: ignore[misc]
    """Holds the twin as ``model``, and the adapters' configs. What PEFT's would do to modules is refused.

    Args:
        twin: see ``build_twin``; its adapted layers are wrapped already.
        config: of the adapter "default".
        owner: the model that it belongs to.
    """

    def __init__(self, twin: nn.Module, config: LoraConfig, owner: Owner) -> None:
        nn.Module.__init__(self)
        self.model = twin
        self.peft_config = {"default": config}
        self.active_adapter = "default"
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.__dict__["qlora_fx_owner"] = owner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def disable_adapter_layers(self) -> None:
        self.qlora_fx_owner.enable_adapters(False)

    def enable_adapter_layers(self) -> None:
        self.qlora_fx_owner.enable_adapters(True)

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        self.qlora_fx_owner.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.qlora_fx_owner.delete_adapter(adapter_name)

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(
            "merge_and_unload", "qmodel.merge(folder) writes a checkpoint with the adapter merged"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse("merge_adapter", "qmodel.merge(folder) writes a checkpoint with the adapter merged")

    def unmerge_adapter(self) -> NoReturn:
        refuse("unmerge_adapter", "an adapter is never merged into the weights in memory")

    def unload(self) -> NoReturn:
        refuse("unload", "with qmodel.disable_adapter(): runs the model without its adapter")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(
            "add_weighted_adapter", "combine folders with PEFT, then qmodel.load_adapter(folder)"
        )

    def inject_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        refuse("inject_adapter", "transform(model, lora=...) decides what is adapted")


def refuse(name: str, instead: str) -> NoReturn:
    raise ModelError(f"{name} changes PEFT's own modules, which a QLoRAModel has not; {instead}")
