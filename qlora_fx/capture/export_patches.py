"""Ways past Python that torch.export cannot follow, or follows badly. All are undone after a capture.

``always`` holds for every capture; ``hard_models`` is tried when a plain one fails (``ways``).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch._dynamo._trace_wrapped_higher_order_op as masks
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from ..runtime.recurrence import LIKE, as_operator
from ..transformers_internals import broadcast_indices, export_patches, masks_expanded_by
from .pictures_at_once import any_number_of_pictures
from .repeated_blocks import walked_once

Patches = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


def ways() -> Iterator[Patches]:
    """What a capture is tried with, in order: the model as it is, its blocks walked once or all of them; then ``hard_models``.

    Raises:
        ImportError: transformers' patches are not where they were. Between two tries, whose errors are collected,
            it is not taken for an error of the model.
    """
    yield walked_once
    yield nothing
    yield functools.partial(hard_models, export_patches())


@contextlib.contextmanager
def hard_models(
    patches: Callable[[], contextlib.AbstractContextManager[None]], model: nn.Module
) -> Iterator[None]:
    """transformers' own export patches, loops over the experts that were hit, and losses that look at their labels.

    Args:
        patches: those of ``transformers.exporters.exporter_dynamo``; they replace data-dependent loops and casts of
            some models by equivalents, and route attention through its math form.
    """
    with patches(), casts_that_change_nothing(), AllExperts():
        name_the_loss(model)
        yield


@contextlib.contextmanager
def always(model: nn.Module) -> Iterator[None]:
    """What helps every model: recurrences as operators, numbers as nodes, indexing inside masks as an operation."""
    with (
        recurrences(model),
        numbers_as_nodes(),
        masks_by_broadcasting(),
        no_gradients_of_their_own(),
        chances_that_are_zero(model),
        any_number_of_pictures(model),
    ):
        yield


DERIVATIVES = frozenset({"GeLUFunction", "PhimoeMultiplier", "SqrtBoundDerivative"})
"""Autograd functions of transformers' models whose backward is the derivative of their forward (but where a square root's
is infinite)."""


@contextlib.contextmanager
def no_gradients_of_their_own() -> Iterator[None]:
    """Refuse models with autograd functions whose backward is another than their forward's derivative.

    export records what the forward does and drops the backward: YOSO's, an expectation, would be lost without a word.

    Raises:
        CaptureError: naming the function.
    """
    found: set[str] = set()
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls.__module__.startswith("transformers.models.") and cls.__name__ not in DERIVATIVES:
            found.add(cls.__name__)
        return original.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = original  # type: ignore[method-assign]
    if found:
        raise CaptureError(
            f"{', '.join(sorted(found))} has a backward of its own, which a captured graph would not have"
        )


def nothing(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The model as it is."""
    return contextlib.nullcontext()


@contextlib.contextmanager
def masks_by_broadcasting() -> Iterator[None]:
    """Masks of index functions that transformers evaluates with vmap, whose traces are no graphs.

    The functions are elementwise in their indices, so indices that broadcast give the same mask.
    """

    def expansion(function: Any) -> Any:
        def mask(batch: Any, head: Any, query: Any, key: Any) -> torch.Tensor:
            result: torch.Tensor = function(*broadcast_indices(batch, head, query, key))
            return result.expand(batch.shape[0], head.shape[0], query.shape[0], key.shape[0])

        return mask

    with (
        masks_expanded_by(expansion),
        mock.patch.object(masks, "mod_index", torch.ops.aten.index),
    ):
        yield


@contextlib.contextmanager
def numbers_as_nodes() -> Iterator[None]:
    """``torch.tensor(0.5)`` in a forward is a number: export would lift it as a constant without a value.

    A list of sizes would be written out as they are in the call.
    """
    original = torch.tensor

    def tensor(data: Any, **options: Any) -> torch.Tensor:
        if isinstance(data, (bool, int, float)):
            return torch.full((), data, **options)
        if isinstance(data, list) and any(isinstance(size, torch.SymInt) for size in data):
            return torch.stack([torch.full((), size, **options) for size in data])
        return original(data, **options)

    torch.tensor = tensor  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.tensor = original


@contextlib.contextmanager
def chances_that_are_zero(model: nn.Module) -> Iterator[None]:
    """Where no layer is ever dropped (LayerDrop, ``config.layerdrop``), draw nothing to decide it.

    transformers drew a number (``torch.rand([])``) for each layer and compared it with 0 before release 5.23, which a
    capture cannot follow.
    """
    configs = [getattr(getattr(m, "config", None), "__dict__", {}) for m in model.modules()]
    chances = [v for c in configs for k, v in c.items() if k.endswith("layerdrop")]
    if not chances or any(chances):
        yield
        return
    original = torch.rand

    def rand(*size: Any, **options: Any) -> Any:
        return 1.0 if size == ([],) else original(*size, **options)

    with mock.patch.object(torch, "rand", rand):
        yield


@contextlib.contextmanager
def recurrences(model: nn.Module) -> Iterator[None]:
    """Let the recurrences over time of the model's modeling files be one operator each (runtime/recurrence.py)."""
    undo: list[tuple[Any, str, Any]] = []
    for name in sorted({type(module).__module__ for module in model.modules()}):
        if not name.startswith("transformers.models."):
            continue
        module = sys.modules[name]
        for function in LIKE:
            original = getattr(module, function, None)
            if original is not None:
                undo.append((module, function, original))
                setattr(module, function, as_operator(original, name))
    try:
        yield
    finally:
        for module, function, original in undo:
            setattr(module, function, original)


def name_the_loss(model: Any) -> None:
    """Let DeBERTa's classifiers compute the loss that they would choose by looking at the labels.

    Without a ``problem_type`` they leave out rows with negative labels; cross-entropy leaves out -100.
    """
    config: Any = getattr(model, "config", None)
    if (
        type(model).__name__
        in ("DebertaForSequenceClassification", "DebertaV2ForSequenceClassification")
        and config.problem_type is None
        and config.num_labels > 1
    ):
        config.problem_type = "single_label_classification"


class AllExperts(TorchFunctionMode):
    """Let ``for expert in hit.nonzero()`` in transformers' expert modules visit every expert.

    An expert that got no token multiplies zero rows and adds nothing, so visiting it changes no value. How
    many experts are hit depends on the data; how many there are does not. Only loops in methods of
    transformers' classes with "Expert" in their name are touched, where this is what the loop means.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hits: dict[int, tuple[torch.Tensor, int]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.unbind, torch.unbind) and id(args[0]) in self.hits:
            _, count = self.hits[id(args[0])]
            return [[i] for i in range(count)]  # indexes as a tensor of one index does
        result = func(*args, **kwargs)
        if func in (torch.Tensor.nonzero, torch.nonzero) and args[0].dim() == 1:
            count, experts = args[0].shape[0], expert_module()
            if isinstance(count, int) and experts is not None:
                # A mask may have one more column, for tokens that another device's experts take.
                count = min(count, getattr(experts, "num_experts", count))
                self.hits[id(result)] = (result, count)  # holding it keeps its id its own
        return result


def expert_module() -> Any:
    """The object whose method is running, if its class is transformers' and named ``...Expert...``."""
    frame = sys._getframe(2)
    for _ in range(8):
        owner = frame.f_locals.get("self")
        cls = type(owner)
        if "Expert" in cls.__name__ and cls.__module__.startswith("transformers.models."):
            return owner
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None


@contextlib.contextmanager
def casts_that_change_nothing() -> Iterator[None]:
    """``self.classifier.to(dtype)`` in a forward, where the module has that dtype already."""
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [t for t in self.parameters() if t.is_floating_point()]
        if device is None and dtype is not None and all(t.dtype == dtype for t in tensors):
            return self
        return original(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]
