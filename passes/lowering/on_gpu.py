"""What Inductor is given for a GPU in place of what is printed: the same values by fewer launches.

With few tokens a step on a GPU is all launching, and what is small costs as much as what is large.

# Note [Dequantizing in one kernel]
With double quantization bitsandbytes' operators take three launches a weight and direction: the nested absmax, its
offset, the weight; calling two of them costs the host some 60 us. The same formula in PyTorch's operators Inductor
fuses into one kernel, which it launches itself: nothing but the dense weight is written. So each forward and backward
has it instead, after they were split, where nothing can be kept of it any more. On a CPU bitsandbytes' operators
stay: their kernels are vectorized by hand.

All such kernels read the same tables, for which Inductor would fuse those of two weights into one, and both dense
weights would live at the same time. ``OneWeightAtATime`` forbids that.

# Note [Gradients in float32]
LoRA's gradients are products of half precision that are cast to float32, the parameters' dtype, by a kernel each.
On a GPU the product itself can write float32 (``aten::mm.dtype``), and the sum over all tokens is not rounded
either.

# Note [One cast]
LoRA's parameters are cast to the compute dtype before each product, two a linear and direction: one kernel casts
up to ``CASTS_AT_ONCE`` of them into one buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, fx
from torch._inductor.choices import InductorChoices
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    Ignored,
    KeywordArg,
    Match,
    PatternMatcherPass,
    fwd_only,
    register_graph_pattern,
)

from ...runtime import ops, torch_versions

aten, prims = torch.ops.aten, torch.ops.prims
operators = torch.ops.bitsandbytes


def dense(
    packed: Tensor,
    absmax: Tensor,
    quant_map: Tensor,
    blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    nested: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """``bitsandbytes::dequantize_4bit``, and before it the nested absmax, as formulas.

    Args:
        packed: uint8, two values a byte, the even one in the high half.
        absmax: ``[blocks]``, float32, or uint8 with ``nested``.
        quant_map: the 16 values.
        shape: of the result.
        nested: ``nested_absmax`` ``[ceil(blocks / 256)]``, ``offset``, the map of 256 values.
    """
    n = math.prod(shape)
    if nested is not None:
        absmax = ops.scales_by_formula(absmax, *nested)
    shift = 4 - 4 * torch.arange(2, dtype=torch.int32, device=packed.device)
    codes = (packed.reshape(-1, 1).int() >> shift) & 15
    values: Tensor = aten._unsafe_index(quant_map, [codes.reshape(-1)[:n]])
    values = values * absmax.repeat_interleave(blocksize)[:n]
    return values.to(dtype).reshape(list(shape))


def on_gpu(val: Tensor) -> bool:
    return val.is_cuda


def held_as_bytes(match: Match) -> bool:
    packed: Tensor = match.kwargs["packed"].meta["val"]
    return on_gpu(packed) and packed.dtype == torch.uint8


TABLE = "dequantize_quant_map"
"""In the names of the tables among the constants of a graph."""


def quant_map(match: Match) -> fx.Node:
    """The 16 values of the type, a constant of the graph."""
    kind, device = match.kwargs["quant_type"], match.kwargs["packed"].meta["val"].device
    name = f"{TABLE}_{kind}"
    graph = match.graph
    module: Any = graph.owning_module
    if not hasattr(module, name):
        module.register_buffer(name, table(kind, device), persistent=False)
    with graph.inserting_before(next(iter(graph.nodes))):
        node = graph.get_attr(name)
    node.meta["val"] = match.kwargs["packed"].meta["val"].new_empty(16, dtype=torch.float32)
    return node


def table(kind: str, device: torch.device) -> Tensor:
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        values: Tensor = bnb.get_4bit_type(kind, device=str(device))
        return values


PATTERNS = PatternMatcherPass(pass_name="one kernel to dequantize")  # type: ignore[no-untyped-call]
Replacement = Callable[..., None]
NESTED = ("nested_absmax", "offset", "nested_quant_map")
LEVELS = CallFunction(
    operators.dequantize_blockwise.default,
    *map(KeywordArg, ("absmax", "nested_absmax", "nested_quant_map")),
    Ignored(),  # type: ignore[no-untyped-call]
    Ignored(),  # type: ignore[no-untyped-call]
    _users=MULTIPLE,
)
ABSMAX = CallFunction(aten.add.Tensor, LEVELS, KeywordArg("offset"), _users=MULTIPLE)


def instead_of_weights(absmax: Any) -> Callable[[Replacement], Replacement]:
    """Decorates what replaces a weight that was made with this ``absmax``."""
    options = map(KeywordArg, ("blocksize", "quant_type", "shape", "dtype"))
    pattern = CallFunction(
        operators.dequantize_4bit.default, KeywordArg("packed"), absmax, *options, _users=MULTIPLE
    )
    register: Any = register_graph_pattern
    return register(pattern, pass_dict=PATTERNS, extra_check=held_as_bytes)  # type: ignore[no-any-return]


@instead_of_weights(KeywordArg("absmax"))  # tried after the one below, which it would match too
@instead_of_weights(ABSMAX)
def weight(match: Match, **values: Any) -> None:
    """Note [Dequantizing in one kernel]."""
    blocksize, shape, dtype = (values[k] for k in ("blocksize", "shape", "dtype"))

    def formula(packed: Tensor, absmax: Tensor, quant_map: Tensor, *nested: Any) -> Tensor:
        return dense(packed, absmax, quant_map, blocksize, shape, dtype, nested or None)  # type: ignore[arg-type]

    nested = [values[name] for name in NESTED if name in values]
    match.replace_by_example(
        formula, [values["packed"], values["absmax"], quant_map(match), *nested]
    )


def fixed(*sizes: Any) -> bool:
    return not any(isinstance(size, torch.SymInt) for size in sizes)


HALF = (torch.bfloat16, torch.float16)
FLOAT32 = CallFunction(
    prims.convert_element_type.default,
    CallFunction(aten.mm.default, KeywordArg("a"), KeywordArg("b")),
    torch.float32,
    _users=MULTIPLE,
)


def sum_over_tokens(match: Match) -> bool:
    """Whether this product's result is as small as a parameter, and can be float32."""
    a, b = (match.kwargs[k].meta["val"] for k in ("a", "b"))
    return on_gpu(a) and a.dtype in HALF and fixed(a.shape[0], b.shape[1])


@register_graph_pattern(FLOAT32, pass_dict=PATTERNS, extra_check=sum_over_tokens)  # type: ignore[untyped-decorator]
def gradient(match: Match, a: fx.Node, b: fx.Node) -> None:
    """Note [Gradients in float32]."""
    cast = match.output_node()
    with match.graph.inserting_before(cast):
        product = match.graph.call_function(aten.mm.dtype, (a, b, torch.float32))
    product.meta.update(cast.meta)
    cast.replace_all_uses_with(product)
    match.erase_nodes()


CASTS_AT_ONCE = 8
"""More inputs than that Inductor concatenates by a kernel each."""
ALIGNED = 8
"""Elements of 16 bits that fill the 16 bytes at which products want their factors to begin."""


def sources(cast: fx.Node) -> list[fx.Node]:
    """The parameters that a cast to half precision reads: one, or several stacked; empty where it is another."""
    read: Any = cast.args[0]
    if cast.args[1] not in HALF:
        return []
    if read.target is aten.cat.default and (len(read.args) == 1 or read.args[1] == 0):
        found = list(read.args[0])
    else:
        found = [read]
    return found if all(is_parameter(n) for n in found) else []


def is_parameter(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return (
        node.op == "placeholder"
        and isinstance(val, Tensor)
        and on_gpu(val)
        and val.dtype == torch.float32
        and val.is_contiguous()
        and fixed(*val.shape)
        and val.numel() % ALIGNED == 0
        and val.dim() == 2
    )


def cast_at_once(graph: fx.Graph) -> None:
    """Note [One cast]."""
    casts = graph.find_nodes(op="call_function", target=prims.convert_element_type.default)
    waiting = [(cast, found) for cast in casts if (found := sources(cast))]
    *_, last = graph.find_nodes(op="placeholder")
    for dtype in HALF:
        group: list[tuple[fx.Node, list[fx.Node]]] = []
        for cast, found in [w for w in waiting if w[0].args[1] is dtype]:
            if sum(len(f) for _, f in group) + len(found) > CASTS_AT_ONCE:
                one_cast(graph, group, dtype, last)
                group = []
            group.append((cast, found))
        one_cast(graph, group, dtype, last)


def one_cast(
    graph: fx.Graph, group: list[tuple[fx.Node, list[fx.Node]]], dtype: torch.dtype, behind: fx.Node
) -> None:
    if len(group) < 2:
        return
    shapes = [cast.meta["val"].shape for cast, _ in group]
    lengths = [math.prod(shape) for shape in shapes]

    def formula(*parameters: Tensor) -> list[Tensor]:
        whole = torch.cat([p.reshape(-1) for p in parameters]).to(dtype)
        parts = torch.split(whole, lengths)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    inputs = [n for _, found in group for n in found]
    traced = fwd_only(formula, [n.meta["val"] for n in inputs])
    mapping = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(behind.next):
        results: Any = graph.graph_copy(traced.graph, mapping)
    for (cast, _), new in zip(group, results, strict=True):
        cast.replace_all_uses_with(new)
        graph.erase_node(cast)


class OnGpu(CustomGraphPass):  # type: ignore[misc]
    """Inductor runs it over each forward and backward; on other devices it changes nothing."""

    def __call__(self, graph: fx.Graph) -> None:
        PATTERNS.apply(graph)
        cast_at_once(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        # Also of the formulas' other half, and of what Inductor is kept from.
        return get_hash_for_files((__file__, ops.__file__, torch_versions.__file__))


class OneWeightAtATime(InductorChoices):  # type: ignore[misc]
    """Inductor's choices, but no kernel dequantizes two weights. Note [Dequantizing in one kernel]."""

    @staticmethod
    def can_fuse_horizontal(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        if all(any(TABLE in name for name in n.used_buffer_names()) for n in (node1, node2)):
            return False
        fusible: bool = InductorChoices.can_fuse_horizontal(
            scheduler, node1, node2, shared_data_score
        )
        return fusible
