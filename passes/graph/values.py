"""What a node gives: its fake value, computed once for equal questions, and its description as text."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import _prims_common as prims
from torch import fx
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

aten = torch.ops.aten
IMPLICIT = DispatchKey.CompositeImplicitAutograd
any_view = torch._refs._reshape_view_helper


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode of the tensors in ``meta["val"]``; there is exactly one per capture."""
    for node in graph.nodes:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            mode: FakeTensorMode = val.fake_mode  # type: ignore[attr-defined]
            return mode
    raise ValueError("graph has no tensor node with meta['val']")


def _value(arg: Any) -> Any:
    return arg.meta["val"] if isinstance(arg, fx.Node) else arg


def fake_value(graph: fx.Graph, target: Any, args: Any, kwargs: Any) -> Any:
    """What the op's fake kernel gives. Layers repeat, so the same question is answered once per capture.

    Fake tensors are descriptions that nobody writes to: nodes may share one. The answers are kept with the
    capture's fake mode, which they hold on to themselves: kept elsewhere they would outlive it.
    """
    mode = fake_mode(graph)
    known: dict[Any, Any] = vars(mode).setdefault("_qlora_fx_known", {})
    key = (target, str(fx.map_arg((args, kwargs), description)))
    found = known.get(key)
    if found is None:
        found = known[key] = computed_value(mode, target, args, kwargs)
    return found


def fake_empty(
    graph: fx.Graph, shape: Iterable[int], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The value of a stored tensor's placeholder."""
    found: torch.Tensor = fake_value(
        graph, aten.empty.memory_format, (list(shape),), {"dtype": dtype, "device": device}
    )
    return found


def computed_value(mode: Any, target: Any, args: Any, kwargs: Any) -> Any:
    values, named = (fx.map_arg(given, _value) for given in (args, kwargs))
    # The dispatcher in Python: PyTorch's C++ would ask for sizes as numbers, and so fix free ones.
    with mode, torch.no_grad(), enable_python_dispatcher():
        if target is aten.linear.default:
            return linear_value(*values)
        return target(*values, **named)


def linear_value(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """``[..., out]``, contiguous: PyTorch goes through six operators to find out. What does not fit is left to it, for its error."""
    alike = is_fake(x) and x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    shapes = x.dim() >= 2 == weight.dim() and (bias is None or bias.shape == weight.shape[:1])
    if alike and shapes and statically_known_true(x.shape[-1] == weight.shape[1]):
        return x.new_empty((*x.shape[:-1], weight.shape[0]))
    return aten.linear.default._op_dk(IMPLICIT, x, weight, bias)


def view_value(tensor: torch.Tensor, *shape: Any, allow_copy: bool) -> torch.Tensor:
    """A fake tensor in another shape: ``torch._refs._reshape_view_helper``.

    Of a dense one the strides are known. PyTorch would look for the sizes that are to be joined or split, by a dozen symbolic
    comparisons and divisions.
    """
    sizes = prims.extract_shape_from_varargs(shape, validate=False)
    inferred = any(isinstance(size, int) and size < 0 for size in sizes)
    if not tensor.dim() or not sizes or inferred or not prims.is_contiguous_or_false(tensor):
        return any_view(tensor, *shape, allow_copy=allow_copy)  # type: ignore[no-any-return]
    torch._check(  # type: ignore[no-untyped-call]
        tensor.numel() == math.prod(sizes),
        lambda: f"{tuple(tensor.shape)} has not as many values as {tuple(sizes)}",
    )
    return tensor.as_strided(sizes, prims.make_contiguous_strides_for(sizes))


def description(node: fx.Node) -> str:
    """What a fake kernel can see of a node's value."""
    return str(pytree.tree_map(value_description, node.meta["val"]))


def value_description(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{val.dtype} {size_texts(val.shape)} {size_texts(val.stride())} {val.device}"
    return size_text(val) if isinstance(val, torch.SymInt) else str(val)


def size_texts(sizes: Iterable[Any]) -> tuple[str, ...]:
    return tuple(map(size_text, sizes))


def size_text(size: Any) -> str:
    """A size as text; a formula is written out once."""
    return formula_text(size.node.expr) if isinstance(size, torch.SymInt) else str(size)


@functools.lru_cache(maxsize=4096)
def formula_text(formula: sympy.Expr) -> str:
    return str(formula)
