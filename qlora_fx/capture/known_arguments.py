"""Which keyword arguments a model takes, also those that it hands on through ``**kwargs``.

A typo in a name would vanish there: the model ignores it, and nobody says that its labels were not seen.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Iterator
from types import CodeType
from typing import Any

from transformers import PreTrainedModel

from ..errors import InputError
from ..transformers_internals import FORWARD_KEYWORDS

LOSS = ("num_items_in_batch", "shift_labels", "ignore_index")
"""Keywords of transformers' loss functions."""
FLAGS = ("return_dict", "use_cache")
"""Read by decorators of transformers' forwards, or refused by name in ``bind_call``."""
OWN = ("return_logits",)
"""Ours: taken off before the model sees the call."""
PARTS = ("encoder_", "decoder_", "text_encoder_")
"""Prefixes by which a composite model hands arguments on to its parts."""


class KnownArguments:
    """The names that a model takes.

    Args:
        model: a transformers model, or any module with a forward.
        signature: of its forward.

    Attributes:
        named: parameters of the forward, in order.
        extra: names that its ``**kwargs`` are declared to take.
    """

    def __init__(self, model: Any, signature: inspect.Signature) -> None:
        self.model = model
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        parameters = signature.parameters.values()
        self.named = tuple(p.name for p in parameters if p.kind not in variable)
        self.has_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self.extra: tuple[str, ...] = ()
        if self.has_kwargs:
            declared = {*FORWARD_KEYWORDS, *LOSS, *FLAGS, *keyword_names(type(model).forward)}
            self.extra = tuple(sorted(declared - set(self.named)))

    def check(self, name: str) -> None:
        """Raise for a name that the model does not take.

        Raises:
            InputError: naming it, the nearest known name, and those that are accepted.
        """
        if name in self.named or name in OWN or (self.has_kwargs and self.hands_on(name)):
            return
        accepted = [*self.named, *OWN, *self.extra]
        near = difflib.get_close_matches(name, accepted, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        more = f"; through its **kwargs: {', '.join(self.extra)}" if self.extra else ""
        raise InputError(
            f"unknown argument {name!r}{hint}; the model takes: {', '.join(self.named)}{more}"
        )

    def hands_on(self, name: str) -> bool:
        """True for what is declared, and for what some part of the model takes or reads by name."""
        if not isinstance(self.model, PreTrainedModel):
            return True  # what its **kwargs mean is not known
        if name in self.extra or name in self.read:
            return True
        for part in PARTS:
            rest = name.removeprefix(part)
            if rest != name and (rest in self.extra or rest in self.read):
                return True
        modality = name.partition("_")[0]
        return modality in ("image", "video", "audio") and hasattr(
            self.model, f"get_{modality}_features"
        )

    @functools.cached_property
    def read(self) -> frozenset[str]:
        """Parameters of the forwards of the model's classes and submodels, and keys that any forward reads."""
        found: set[str] = set()
        classes: set[Any] = {type(module) for module in self.model.modules()}
        for cls in classes:
            found |= keys_read(cls.forward)
            for kind in cls.__mro__:
                if issubclass(kind, PreTrainedModel) and "forward" in kind.__dict__:
                    found |= parameter_names(kind.forward) | keys_read(kind.forward)
        return frozenset(found)


def parameter_names(function: Any) -> set[str]:
    """Parameters that can be passed by name."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind in kinds} - {"self"}


def keyword_names(function: Any) -> set[str]:
    """Names of ``**kwargs: Unpack[SomeTypedDict]``; none where the annotation says nothing."""
    try:
        parameters = inspect.signature(function, eval_str=True).parameters.values()
    except (NameError, TypeError, ValueError, SyntaxError, AttributeError):
        return set()
    for p in parameters:
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            kinds = typing.get_args(p.annotation)
            return set(getattr(kinds[0], "__annotations__", ())) if kinds else set()
    return set()


def keys_read(function: Any) -> set[str]:
    """Strings in a function's code that may be keys: ``kwargs.get("name")``, ``kwargs["name"]``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return {text for text in strings_of(code) if text.isidentifier()} if code else set()


def strings_of(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from strings_of(constant)
