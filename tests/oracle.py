"""Truth and the reference stack, for tests: the same weights and adapters run by other means."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import qlora_fx
import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from qlora_fx.testing.check import Float64, relative_error
from qlora_fx.testing.reference import dense_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = [
    "Float64",
    "ours",
    "random_adapter",
    "reference",
    "relative_error",
    "step",
    "truth",
    "with_stored_values",
]

KEEP = ("lm_head",)


def linears(model: nn.Module, keep: tuple[str, ...] = KEEP) -> dict[str, nn.Module]:
    return {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and n.rsplit(".", 1)[-1] not in keep
    }


def with_stored_values(model: Any, qmodel: Any) -> Any:
    """A copy of a dense model with the values that the storage of ``qmodel`` stands for."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, weight in dense_weights(model, qmodel.base).items():
            tensors[name].copy_(weight)
    return model


def random_adapter(
    model: nn.Module, r: int, *, scale: float = 0.02, keep: tuple[str, ...] = KEEP
) -> dict[str, torch.Tensor]:
    """A and B, both random (B is not zero), under PEFT's saved keys."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for name, module in linears(model, keep).items():
        out, inn = shape(module)
        state[f"base_model.model.{name}.lora_A.weight"] = (
            torch.randn(r, inn, generator=generator) * scale
        )
        state[f"base_model.model.{name}.lora_B.weight"] = (
            torch.randn(out, r, generator=generator) * scale
        )
    return state


def shape(module: nn.Module) -> tuple[int, int]:
    weight: Any = module.weight
    return tuple(weight.shape[::-1]) if isinstance(module, Conv1D) else tuple(weight.shape)  # type: ignore[return-value]


def truth(
    model: nn.Module,
    adapter: Mapping[str, torch.Tensor],
    scaling: float,
    *,
    quant_type: str = "nf4",
    double_quant: bool = True,
    keep: tuple[str, ...] = KEEP,
) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """A float64 eager copy: weights dequantized, LoRA in plain code. Run it under ``Float64()``."""
    dense = copy.deepcopy(model)
    lora: dict[str, nn.Parameter] = {}
    for name, module in linears(dense, keep).items():
        weight: Any = module.weight
        w = weight.data.T if isinstance(module, Conv1D) else weight.data
        packed, state = bnb.functional.quantize_4bit(
            w.contiguous(), compress_statistics=double_quant, quant_type=quant_type
        )
        state.dtype, state.shape = torch.float32, torch.Size((1, w.numel()))
        new = bnb.functional.dequantize_4bit(packed, state).view(w.shape).double()
        module.weight = nn.Parameter(new.T.contiguous() if isinstance(module, Conv1D) else new)
        a, b = (f"base_model.model.{name}.lora_{x}.weight" for x in "AB")
        if a not in adapter:
            continue
        lora[a], lora[b] = (nn.Parameter(adapter[k].double()) for k in (a, b))

        def hook(_m: Any, args: Any, out: Any, a: Any = lora[a], b: Any = lora[b]) -> Any:
            return out + scaling * (args[0] @ a.T) @ b.T

        module.register_forward_hook(hook)
    dense = dense.double().requires_grad_(False)
    return dense, lora


def reference(
    model: nn.Module,
    adapter: Mapping[str, torch.Tensor],
    config: LoraConfig,
    *,
    compute_dtype: torch.dtype = torch.float32,
    quant_type: str = "nf4",
    double_quant: bool = True,
    keep: tuple[str, ...] = KEEP,
) -> tuple[Any, dict[str, nn.Parameter]]:
    """transformers + bitsandbytes + PEFT, in train mode (never eval: bitsandbytes repacks weights there)."""
    q = copy.deepcopy(model)
    for name, module in linears(q, keep).items():
        if isinstance(module, Conv1D):
            continue
        bias = module.bias
        new = bnb.nn.Linear4bit(
            module.in_features,  # type: ignore[arg-type]
            module.out_features,  # type: ignore[arg-type]
            bias=bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=double_quant,
            quant_type=quant_type,
        )
        new.weight = bnb.nn.Params4bit(
            module.weight.data,  # type: ignore[arg-type]
            requires_grad=False,
            quant_type=quant_type,
            compress_statistics=double_quant,
            module=new,
        )
        if bias is not None:
            new.bias = bias  # type: ignore[assignment]
        path, _, leaf = name.rpartition(".")
        setattr(q.get_submodule(path), leaf, new)
    q = q.to(next(model.parameters()).device).train()
    for p in q.parameters():
        if p.is_floating_point():
            p.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = get_peft_model(q, config)
    peft.train()
    params = {n: p for n, p in peft.named_parameters() if "lora_" in n}
    named = {n.replace(".default.", "."): p for n, p in params.items()}
    with torch.no_grad():
        for n, p in named.items():
            p.copy_(adapter[n])
    return peft, named


def ours(
    model: nn.Module, adapter: Mapping[str, torch.Tensor], config: LoraConfig, **options: Any
) -> tuple[qlora_fx.QLoRAModel, dict[str, nn.Parameter]]:
    """A copy of ``model`` through ``qlora_fx.transform`` with the given adapter."""
    qmodel = qlora_fx.transform(copy.deepcopy(model), config, **options)
    qmodel.load_adapter_state_dict(adapter)
    return qmodel, {f"base_model.model.{n}": p for n, p in qmodel.adapter_parameters()}


def step(
    model: Any, params: Mapping[str, nn.Parameter], batch: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and every adapter's gradient of one forward and backward.

    A training step of ours makes no logits; they are asked for in a call of their own.
    """
    for p in params.values():
        p.grad = None
    out = model(**batch)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in params.items() if p.grad is not None}
    if out.logits is None:
        with torch.no_grad():
            out = model(**batch, return_logits=True)
    return out.logits.detach(), grads
