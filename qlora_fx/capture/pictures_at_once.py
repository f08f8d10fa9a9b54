"""While a model is traced: what it does picture by picture is done for all at once, with the same result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Set
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..errors import CaptureError
from .padded_pictures import TOWER, all_frames_at_once
from .pictures import is_table, takes
from .tiled_pictures import PACKERS, all_tiles_at_once


@contextlib.contextmanager
def any_number_of_pictures(model: nn.Module) -> Iterator[None]:
    """Let what the model does picture by picture be done for all at once, with the same result."""
    packed = [m for m in model.modules() if takes(m, "cu_seqlens")]
    configs = {id(m.config) for m in packed if hasattr(m, "config")}
    files = {type(m).__module__: sys.modules[type(m).__module__] for m in packed}
    with contextlib.ExitStack() as stack:
        attention = Packed()
        for tower in (m for m in model.modules() if takes(m, "grid_thw")):
            handle = tower.register_forward_pre_hook(attention.prepare, with_kwargs=True)
            stack.callback(handle.remove)
        for file in files.values():
            if not hasattr(file, "is_flash_attention_requested"):
                continue
            flash, functions = file.is_flash_attention_requested, file.ALL_ATTENTION_FUNCTIONS
            stack.enter_context(
                mock.patch.multiple(
                    file,
                    is_flash_attention_requested=lambda config, flash=flash: (
                        id(config) in configs or flash(config)
                    ),
                    ALL_ATTENTION_FUNCTIONS=Functions(functions, attention),
                )
            )
        for cls in {type(m) for m in model.modules() if type(m).__name__ in ADDED}:
            stack.enter_context(mock.patch.object(cls, "_deepstack_process", added_at))
        classes = {type(m).__name__ for m in model.modules()}
        stack.enter_context(all_frames_at_once(model))
        stack.enter_context(all_tiles_at_once(model))
        if packed or classes & (SPLIT | LISTED | CUT):
            stack.enter_context(AllAtOnce(classes))
            for kind in (FakeTensor, FunctionalTensor):
                lengths = lengths_of_any_number(kind.tolist)
                stack.enter_context(mock.patch.object(kind, "tolist", lengths))
        yield


class Functions:
    """transformers' table of attention functions, in which attention over packed rows is ours."""

    def __init__(self, original: Any, packed: Packed) -> None:
        self.original = original
        self.packed = packed

    def __getitem__(self, name: str) -> Any:
        return self.original[name]

    def get_interface(self, name: str, default: Any) -> Any:
        function = self.original.get_interface(name, default)

        def attention(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("cu_seq_lens_q") is None:
                return function(*args, **kwargs)
            return self.packed(*args, **kwargs)

        return attention


class Packed:
    """Attention of patches to those of the same picture, frame or window, through one mask for all layers."""

    def __init__(self) -> None:
        self.masks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        *,
        cu_seq_lens_q: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """``[1, heads, patches, size]`` to ``[1, patches, heads, size]``, as transformers' functions do.

        Raises:
            CaptureError: there is a mask besides.
        """
        if attention_mask is not None:
            raise CaptureError("attention over packed rows takes no mask besides their ends")
        result = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=self.mask(cu_seq_lens_q, query.shape[2], query.device),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return result.transpose(1, 2).contiguous(), None

    def prepare(self, tower: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the masks before the tower's first layer, so that all its layers are alike."""
        for name, value in kwargs.items():
            if name.startswith("cu_"):
                self.mask(value, args[0].shape[0], args[0].device)

    def mask(self, ends: torch.Tensor, patches: int, device: torch.device) -> torch.Tensor:
        """Bool ``[1, 1, patches, patches]``: true within a picture."""
        for known, mask in self.masks:
            if known is ends:
                return mask
        number = torch.bucketize(torch.arange(patches, device=device), ends, right=True)
        mask = (number[:, None] == number[None, :])[None, None]
        self.masks.append((ends, mask))
        return mask


def added_at(
    model: nn.Module, hidden: torch.Tensor, at: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Features of pictures added to the hidden states of their tokens: Qwen3-VL's, without indexing by a mask."""
    at, features = at.to(hidden.device)[..., None], features.to(hidden.device, hidden.dtype)
    return hidden + torch.zeros_like(hidden).masked_scatter(at, features)


ADDED = frozenset({"Qwen3VLTextModel", "Qwen3VLMoeTextModel"})
"""Add features of pictures to hidden states in deeper layers."""
SPLIT = frozenset({"Idefics2Model", "Idefics3Model"})
"""Go through features that ``split`` gave, only to reshape and join them."""
LISTED = frozenset({"LlavaModel", "LlavaNextVideoModel"})
"""Make a list of features ``[pictures, tokens, hidden]``, only to join it."""


CUT = PACKERS | {"Gemma4Model", "Mistral3Model", "MistralLarge4Model", "LightOnOcrModel"}
"""Cut features of all pictures apart, only to join them."""


class AllAtOnce(TorchFunctionMode):
    """Features of all pictures, cut apart by their lengths and joined again, are left in one piece.

    ``torch.cat(torch.split(features, lengths.tolist()))``: as many lengths as there are pictures, which a graph would
    be written for.

    Args:
        classes: names of the model's classes; what goes through the pieces finds one of them, if that is known to be
            right: ``SPLIT`` and ``LISTED``.
    """

    def __init__(self, classes: Set[str]) -> None:
        super().__init__()
        self.split, self.listed = bool(classes & SPLIT), bool(classes & LISTED)
        self.tables = bool(classes & {*PACKERS, *TOWER})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func in (torch.split, torch.Tensor.split)
            and len(args) == 2
            and (type(args[1]) is Lengths or (isinstance(args[1], list) and not args[1]))
        ):
            if self.split:
                return (args[0],)
            return Whole(args[0], kwargs.get("dim", 0))
        of_rows = func in LISTING and args[1:] in ((), (0,))
        if of_rows and self.tables and is_table_of_any_length(args[0]):
            # Features are split by what is made of its rows.
            return 0 if func is torch.Tensor.__len__ else ()
        if of_rows and self.listed and args[0].dim() == 3 and of_any_length(args[0]):
            return 1 if func is torch.Tensor.__len__ else (args[0].flatten(0, 1),)
        if func is torch.cat and type(args[0]) is Whole:
            return args[0].joined(kwargs.get("dim", args[1] if len(args) > 1 else 0))
        return func(*args, **kwargs)


def lengths_of_any_number(original: Any) -> Any:
    """A ``tolist`` that gives ``Lengths`` where it is not known how many there are."""

    def tolist(tensor: torch.Tensor) -> Any:
        if tensor.dim() == 1 and of_any_length(tensor):
            return Lengths()
        return original(tensor)

    return tolist


LISTING = (torch.Tensor.__len__, torch.Tensor.unbind)
"""What ``list(tensor)`` calls."""


def of_any_length(tensor: torch.Tensor) -> bool:
    return isinstance(tensor.shape[0], torch.SymInt)


def is_table_of_any_length(value: torch.Tensor) -> bool:
    """True for what takes the place of pictures' sizes (pictures.py)."""
    return (
        value.dim() == 2
        and of_any_length(value)
        and isinstance(value.shape[1], int)
        and is_table(value)
    )


class Unlooked(tuple[Any, ...]):
    """A tuple whose number of elements is not known."""

    def refuse(self, *args: Any) -> Any:
        raise NotImplementedError("the model looks at its pictures one by one")

    __iter__ = __len__ = __getitem__ = __add__ = __contains__ = refuse  # type: ignore[assignment]


class Lengths(Unlooked):
    """How many features each picture has."""


class Whole(Unlooked):
    """Features of all pictures, joined: what ``torch.split`` gives."""

    features: torch.Tensor
    dim: int

    def __new__(cls, features: torch.Tensor, dim: int) -> Whole:
        self = super().__new__(cls)
        self.features, self.dim = features, dim
        return self

    def joined(self, dim: int) -> torch.Tensor:
        if dim != self.dim:
            self.refuse()
        return self.features
