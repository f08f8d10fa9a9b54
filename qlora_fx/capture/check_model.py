"""Which models ``transform`` accepts, and what becomes of one that it has taken."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .skeleton import named_tensors

USED_UP = (
    "this model's weights were moved into the QLoRAModel that transform returned; call that one"
)


def mark_used_up(model: Any) -> None:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise ModelError(USED_UP)

    model.forward = forward
    model._qlora_fx_used_up = True


def check_model(model: Any) -> None:
    """Refuse what cannot be transformed, before anything is changed.

    Raises:
        ModelError: saying what is wrong and what to do.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ModelError(
            f"model is a {type(model).__name__}; accepted: a transformers model (with a .config)"
        )
    if getattr(model, "_qlora_fx_used_up", False):
        raise ModelError(USED_UP)
    if hasattr(model, "peft_config"):
        raise ModelError(
            "the model already has PEFT adapters; pass the base model, and afterwards qmodel.load_adapter(folder)"
        )
    tensors = dict(named_tensors(model))
    if not any(t.is_floating_point() for t in tensors.values()):
        raise ModelError(f"{type(model).__name__} has no floating-point parameter")
    devices: dict[torch.device, str] = {}
    for name, tensor in tensors.items():
        if hasattr(tensor, "quant_state") or not (
            tensor.is_floating_point() or name_is_buffer(model, name)
        ):
            raise ModelError(
                f"{name} is already quantized ({type(tensor).__name__}, {tensor.dtype}); load the model "
                "without quantization_config and let transform quantize it"
            )
        devices.setdefault(tensor.device, name)
    if torch.device("meta") in devices:
        raise ModelError(
            f"{devices[torch.device('meta')]} is on the meta device and has no values; load the model with "
            "from_pretrained first"
        )
    if len(devices) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ModelError(f"the model is on several devices ({where}); accepted: one device")
    for name, tensor in dict(model.named_parameters()).items():
        if not torch.isfinite(tensor.detach().sum()):
            bad = int((~torch.isfinite(tensor.detach())).sum())
            if bad:
                raise ModelError(
                    f"{name} {list(tensor.shape)} has {bad} values that are NaN or infinite; quantizing would "
                    "spread them over whole blocks. Check the checkpoint"
                )


def name_is_buffer(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf in model.get_submodule(path)._buffers
