"""A model's own recurrence over time (a chunked scan, the gated delta rule), as one operator.

transformers writes these as Python loops whose length depends on the sequence. Traced, every step of the loop becomes
nodes, each length a graph of its own, and a compiler gets thousands of small operations to schedule. As an operator
the model's own function runs as it is, for any length, with whatever kernel transformers finds for it (flash-linear-
attention, mamba-ssm). Its backward runs the function again and differentiates that: nothing inside is held meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import ANY_STRIDES, ops


@torch.library.custom_op("qlora_fx::recurrence", mutates_args=(), tags=ANY_STRIDES)
def recurrence(
    tensors: Sequence[Tensor], function: str, options: str, like: int, dtype: torch.dtype
) -> Tensor:
    """``function(**arguments)``, or its first result.

    Args:
        tensors: its tensor arguments.
        function: ``module:name``.
        options: JSON: ``names`` of the tensors, and ``given``, the other arguments.
        like: which tensor the result has the shape of.
        dtype: of the result.

    Returns:
        Contiguous, in ``dtype``.
    """
    return run(tensors, function, options).to(dtype).contiguous().clone()


@recurrence.register_fake
def _(
    tensors: Sequence[Tensor], function: str, options: str, like: int, dtype: torch.dtype
) -> Tensor:
    return torch.empty(tensors[like].shape, dtype=dtype, device=tensors[like].device)


@torch.library.custom_op("qlora_fx::recurrence_backward", mutates_args=(), tags=ANY_STRIDES)
def recurrence_backward(
    grad: Tensor, tensors: Sequence[Tensor], function: str, options: str, wanted: Sequence[int]
) -> list[Tensor]:
    """Gradients of ``recurrence`` for the ``wanted`` tensors, contiguous and in their dtypes."""
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    with torch.enable_grad(), with_autograd():
        result = run(inputs, function, options)
        found = torch.autograd.grad(
            result, [inputs[i] for i in wanted], grad.to(result.dtype), allow_unused=True
        )
    return [
        torch.zeros_like(inputs[i], memory_format=torch.contiguous_format)
        if g is None
        else g.contiguous().clone()
        for i, g in zip(wanted, found, strict=True)
    ]


@recurrence_backward.register_fake
def _(
    grad: Tensor, tensors: Sequence[Tensor], function: str, options: str, wanted: Sequence[int]
) -> list[Tensor]:
    return [
        torch.empty(tensors[i].shape, dtype=tensors[i].dtype, device=tensors[i].device)
        for i in wanted
    ]


def _context(ctx: Any, inputs: Any, output: Tensor) -> None:
    tensors, function, options, *_ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = function, options
    ctx.wanted = [i for i, t in enumerate(tensors) if t.requires_grad]


def _backward(ctx: Any, grad: Tensor) -> Any:
    tensors = list(ctx.saved_tensors)
    found = ops.recurrence_backward(grad, tensors, *ctx.options, ctx.wanted)
    by_place = dict(zip(ctx.wanted, found, strict=True))
    return [by_place.get(i) for i in range(len(tensors))], None, None, None, None


torch.library.register_autograd("qlora_fx::recurrence", _backward, setup_context=_context)


@contextlib.contextmanager
def with_autograd() -> Iterator[None]:
    """Record operations inside an operator, whose kernel PyTorch calls with recording switched off."""
    keys = torch._C.DispatchKey
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (keys.AutogradFunctionality, keys.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


def run(tensors: Sequence[Tensor], function: str, options: str) -> Tensor:
    """The function's (first) result."""
    call = json.loads(options)
    arguments = dict(zip(call["names"], tensors, strict=True)) | call["given"]
    result = find(function)(**arguments)
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


@functools.cache
def find(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return getattr(found, "recurrence_of", found)


LIKE = {
    "torch_chunk_gated_delta_rule": "value",
    "chunk_kimi_delta_attention": "value",
    "mamba2_chunk_scan": "hidden_states",
    "mamba_selective_scan": "hidden_states",
    "rwkv_linear_attention": "key",
}
"""Recurrences of transformers' modeling files, and the argument whose shape the result has."""
PAIRS = frozenset(
    {"torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention", "rwkv_linear_attention"}
)
"""Those that also return a state, None where it was not asked for."""
STATES = ("output_final_state", "return_final_states", "return_last_state", "return_state")


def as_operator(function: Callable[..., Any], module: str) -> Callable[..., Any]:
    """A stand-in for a recurrence that calls the operator, while a model is captured.

    Where a state goes in or is asked for, the function itself is called.
    """
    name = function.__name__
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        arguments |= arguments.pop("kwargs", {})
        arguments = {k: v for k, v in arguments.items() if v is not None}
        tensors = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        given = {k: v for k, v in arguments.items() if k not in tensors}
        state = any(k in tensors for k in ("initial_state", "initial_states", "state"))
        if state or any(given.get(k) for k in STATES):
            return function(*args, **kwargs)
        try:
            options = json.dumps({"names": list(tensors), "given": given}, sort_keys=True)
        except TypeError:  # a free size, or an object
            return function(*args, **kwargs)
        result = ops.recurrence(
            list(tensors.values()),
            f"{module}:{name}",
            options,
            list(tensors).index(LIKE[name]),
            result_dtype(function, tensors, given),
        )
        return (result, None) if name in PAIRS else result

    call.recurrence_of = function  # type: ignore[attr-defined]
    return call


def result_dtype(
    function: Callable[..., Any], tensors: dict[str, Tensor], given: dict[str, Any]
) -> torch.dtype:
    """The dtype of the result, from a call without data, with free sizes of 2."""
    small = {
        k: torch.empty([s if type(s) is int else 2 for s in t.shape], dtype=t.dtype, device="meta")
        for k, t in tensors.items()
    }
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        result = function(**small, **given)
    found: torch.dtype = (result[0] if isinstance(result, tuple) else result).dtype
    return found
