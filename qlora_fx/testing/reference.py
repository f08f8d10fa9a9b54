"""What a transformed model stands for, in eager PyTorch and float64.

The oracle knows nothing of graphs: a copy of the user's model in eager PyTorch and float64, in which each
quantized weight is replaced by the values its 4-bit storage stands for, and LoRA's ``scaling * B A`` (the
definition, arXiv:2106.09685) is added to the weight. What it computes is the truth; the same copy in float32
shows how much error the precision alone explains.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from ..capture.holders import holders, transposed_stacks
from ..capture.skeleton import named_tensors
from ..passes.graph.site import Site
from ..weights.base import Base


class Float64(TorchFunctionMode):
    """Models cast to float32 inside norms and rotary tables; under this mode they stay in float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func in (torch.Tensor.to, torch.Tensor.type, torch.nn.functional.softmax, torch.softmax):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def relative_error(value: torch.Tensor, true: torch.Tensor) -> float:
    """``|value - true| / |true|`` in the Frobenius norm, computed in float64; 0 where both are zero."""
    value, true = value.detach().double(), true.detach().double()
    distance = float((value - true).norm())
    return distance / max(float(true.norm()), torch.finfo(torch.float64).tiny) if distance else 0.0


class Oracle:
    """An eager copy of ``model`` that computes what a transformed model stands for.

    Args:
        model: the model as it was before ``transform``.
        base: of the transformed model (``qmodel.base``); its storage and adapter values are read.
        training: the mode.
        dtype: ``torch.float64`` for the truth.
        adapter: False leaves the adapter out.

    Attributes:
        adapters: the adapter's parameters in ``dtype``, by their names in the store.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Base,
        *,
        training: bool = True,
        dtype: torch.dtype = torch.float64,
        adapter: bool = True,
    ) -> None:
        self.dtype = dtype
        self.model: Any = copy.deepcopy(model)._apply(self.cast)  # type: ignore[no-untyped-call]
        self.model.requires_grad_(False)
        for module in self.model.modules():  # the plain loop over experts
            config: Any = getattr(module, "config", None)
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = "eager"
        self.model.train(training)
        self.weights = {
            name: tensor.to(dtype) for name, tensor in dense_weights(model, base).items()
        }
        self.adapters: dict[str, nn.Parameter] = {}
        self.sites = [s for s in base.sites.values() if s.adapt and adapter]
        for site in self.sites:
            for tensor in base.adapter.tensors(site).values():
                values = base.store[tensor.key].detach().to(dtype)
                self.adapters[tensor.key] = nn.Parameter(values)
        self.tensors = base.adapter.tensors
        self.trained = dict(base.trained) if adapter else {}
        for key in self.trained:
            self.adapters[key] = nn.Parameter(base.store[key].detach().to(dtype))
        self.keys = base.skeleton.keys
        # Merged, an adapter would act on everybody who reads the weight; it belongs to the module.
        borrowed = {s.weight for s in base.sites.values() if s.kind == "reader"}
        for site in self.sites:
            if site.kind == "linear" and site.weight in borrowed:
                self.add_beside(site)
        self.sites = [s for s in self.sites if s.kind != "linear" or s.weight not in borrowed]
        self.stacks = transposed_stacks(model)
        self.kinds = holders(model)
        self.conv1d = {n for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """As ``Module.to(dtype)``, which takes the imaginary part from complex tensors (rotary tables of Llama 4's pictures)."""
        if tensor.is_complex():
            return tensor.to(self.dtype.to_complex())
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def add_beside(self, site: Site) -> None:
        """Add the adapter's product to the module's output instead of its weight."""
        a, b = self.factors(site)

        def hook(_: nn.Module, args: Any, output: torch.Tensor) -> Any:
            return output + site.scaling * (args[0] @ a.T) @ b.T

        self.model.get_submodule(site.name).register_forward_hook(hook)

    def parameters(self) -> dict[str, torch.Tensor]:
        """Every replaced weight of the model, by name; those of adapted sites depend on the adapter."""
        values = dict(self.weights)
        for site in self.sites:
            name = f"{site.name}.weight" if site.kind in ("linear", "conv") else site.weight
            base = values.get(name)
            if base is None:
                base = self.model.get_parameter(name)
            a, b = self.factors(site)
            values[name] = base + site.scaling * self.delta(site, a, b, tuple(base.shape))
        for trained, key in self.trained.items():
            values |= {n: self.adapters[trained] for n, k in self.keys.items() if k == key}
        return values

    def factors(self, site: Site) -> tuple[nn.Parameter, nn.Parameter]:
        """LoRA's A and B of a site."""
        a, b = (self.adapters[tensor.key] for tensor in self.tensors(site).values())
        return a, b

    def delta(
        self, site: Site, a: torch.Tensor, b: torch.Tensor, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """PEFT's ``get_delta_weight`` for the parameter as the model holds it."""
        if site.kind == "linear":
            return (b @ a).T if site.name in self.conv1d else b @ a
        if site.kind == "conv":
            return (b.flatten(1) @ a.flatten(1)).reshape(shape)
        if site.kind == "parameter" and len(shape) == 2:
            return b @ a
        if site.kind == "parameter":
            stacked = a.reshape(shape[0], site.r, -1)
            spread = b.reshape(b.shape[0], site.r, shape[0])
            order = "eio" if site.weight.rpartition(".")[0] in self.stacks else "eoi"
            return torch.einsum(f"ore,eri->{order}", spread, stacked)
        if site.experts:  # a form PEFT has no adapter for: the canonical weight's
            stacked = a.reshape(site.experts, site.r, -1)
            spread = b.reshape(b.shape[0], site.r, site.experts).permute(2, 0, 1)
            return site.layout.inverse(spread @ stacked).reshape(shape)
        return site.layout.inverse(b @ a).reshape(shape)

    def __call__(self, batch: Mapping[str, Any]) -> Any:
        """The model's own output for ``batch``, whose floating-point tensors are cast."""
        cast = {
            k: v.to(self.dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in batch.items()
        }
        if "use_cache" in inspect.signature(self.model.forward).parameters:
            cast["use_cache"] = False
        if self.dtype is not torch.float64:
            return functional_call(self.model, self.parameters(), (), cast, tie_weights=False)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with Float64():
                return functional_call(self.model, self.parameters(), (), cast, tie_weights=False)
        finally:
            torch.set_default_dtype(before)


def dense_weights(model: nn.Module, base: Base) -> dict[str, torch.Tensor]:
    """What quantized storage stands for, float32, in each parameter's own shape and under all its names."""
    dense: dict[str, torch.Tensor] = {}
    tensors = dict(named_tensors(model))
    for site in base.sites.values():
        if not site.quantize or site.weight in dense:
            continue
        parts = base.store.parts(site.weight)
        weight = base.scheme.dequantize(parts, site.shape, torch.float32)
        dense[site.weight] = site.layout.inverse(weight).reshape(tensors[site.weight].shape)
    keys = base.skeleton.keys
    return {name: dense[key] for name, key in keys.items() if key in dense}
