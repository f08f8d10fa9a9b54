"""What the compiler must know of an operator that it takes whole: one entry each.

PyTorch's own formulas (``torch.utils.flop_counter``) compare and multiply numbers; sizes are formulas here, and what
a causal mask hides counts as not computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from ...runtime import few_rows
from ...runtime.loss import workspace
from ...runtime.ops import form_groups, takes_groups
from ..graph.nodes import args_of, arguments, ops

aten = torch.ops.aten
ZERO = sympy.Integer(0)


def expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def elements(val: torch.Tensor) -> sympy.Expr:
    return sympy.prod([expression(s) for s in val.shape])


def nothing(node: fx.Node) -> sympy.Expr:
    return ZERO


def never(node: fx.Node) -> bool:
    return False


def always(node: fx.Node) -> bool:
    return True


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        flops: multiplications and additions of a call.
        workspace: bytes that a call takes for itself while it runs.
        without_grad: changes a call where nobody will ask for gradients: so that it forms none of its own, or is a kernel's.
        waits: whether a call, or its backward, waits for the device, to know on the host what it has computed.
    """

    flops: Callable[[fx.Node], sympy.Expr] = nothing
    workspace: Callable[[fx.Node], sympy.Expr] = nothing
    without_grad: Callable[[fx.Node], None] | None = None
    waits: Callable[[fx.Node], bool] = never


def value_of(node: fx.Node, position: int) -> Any:
    return args_of(node)[position].meta["val"]


def product_flops(node: fx.Node) -> sympy.Expr:
    """Two per element of the result and of the sum over the last factor's rows."""
    factors = [n for n in node.args if isinstance(n, fx.Node)]
    return 2 * elements(node.meta["val"]) * expression(factors[-1].meta["val"].shape[-2])


def grouped_flops(node: fx.Node) -> sympy.Expr:
    """Each row meets one matrix."""
    return 2 * elements(value_of(node, 0)) * expression(node.meta["val"].shape[-1])


def attention_flops(node: fx.Node) -> sympy.Expr:
    """Two products, of which a causal mask leaves half."""
    q = value_of(node, 0)
    return 2 * elements(q) * expression(q.shape[2])


def attention_backward_flops(node: fx.Node) -> sympy.Expr:
    """Five products, of which a causal mask leaves half."""
    q = value_of(node, 1)
    return 5 * elements(q) * expression(q.shape[2])


def cached_attention_flops(node: fx.Node) -> sympy.Expr:
    """Two products with every key, earlier and new."""
    q, past, k = (value_of(node, i) for i in range(3))
    return 4 * elements(q) * (expression(past.shape[0]) + expression(k.shape[2]))


def loss_flops(node: fx.Node) -> sympy.Expr:
    """The logits and the input's gradient, formed in one pass."""
    return 4 * elements(value_of(node, 0)) * expression(arguments(node)["shape"][0])


ON_GPU = sympy.Symbol("on_gpu")
"""1 where a formula is asked for a GPU; 0 elsewhere, and where nothing is said."""


def by_device(on_gpu: sympy.Expr, elsewhere: sympy.Expr) -> sympy.Expr:
    return ON_GPU * on_gpu + (1 - ON_GPU) * elsewhere


def loss_workspace(node: fx.Node) -> sympy.Expr:
    args = arguments(node)
    x, head = args["x"].meta["val"], args["weight"][0].meta["val"]
    dense = not args["quant_type"] and head.dtype == x.dtype
    shape = (expression(x.shape[0]), *args["shape"], x.dtype.itemsize)
    return by_device(
        *(
            workspace(*shape, dense=dense, device=torch.device(device), smaller=sympy.Min)
            for device in ("cuda", "cpu")
        )
    )


def grouped_workspace(node: fx.Node) -> sympy.Expr:
    """The dense stack and its absmax in float32 where one launch multiplies all experts, else one expert dense."""
    args = arguments(node)
    x, packed = args["x"].meta["val"], args["packed"].meta["val"]
    size = math.prod(args["shape"])
    one = sympy.Integer(size * x.dtype.itemsize)
    if not form_groups(x.dtype, *args["shape"]):
        return one
    stack = packed.shape[0] * (2 * size + 4 * -(-size // args["blocksize"]))
    return by_device(sympy.Integer(stack), one)


def loss_without_grad(node: fx.Node) -> None:
    node.args = (*node.args[:-1], False)


def by_cpu_kernel(node: fx.Node) -> None:
    """Call the kernel for few rows past Python, if it reads these tensors as they are. Note [Products of few rows]."""
    args = arguments(node)
    x, *tensors = (args[name].meta["val"] for name in ("x", "bias") if args[name] is not None)
    factors = (args[name].meta["val"] for name in ("lora_a", "lora_b") if args[name] is not None)
    if x.device.type != "cpu" or x.dtype not in few_rows.DTYPES:
        return
    if any(t.dtype != x.dtype for t in tensors) or any(t.dtype != torch.float32 for t in factors):
        return
    if node.target is ops.linear_4bit.default:
        name, taken = "linear_4bit", few_rows.takes_4bit(args["shape"][1], args["blocksize"])
    else:
        name, taken = "linear_dense", few_rows.takes_dense(int(x.shape[-1]), x.dtype)
    kernels = few_rows.kernels() if taken else None
    if kernels is not None:
        node.target = getattr(kernels, name).default


def goes_group_by_group(node: fx.Node) -> bool:
    """Note [Groups on a GPU]: rows and columns of the experts' matrices are the sizes of operand and result."""
    x, result = value_of(node, 0), node.meta["val"]
    return not takes_groups(x, x.shape[1], result.shape[-1])


OPERATORS: dict[Any, Operator] = {
    aten.mm.default: Operator(product_flops),
    aten.bmm.default: Operator(product_flops),
    aten.addmm.default: Operator(product_flops),
    ops.grouped_linear.default: Operator(grouped_flops, waits=goes_group_by_group),
    ops.grouped_linear_4bit.default: Operator(
        grouped_flops, grouped_workspace, waits=goes_group_by_group
    ),
    ops.linear_4bit.default: Operator(grouped_flops, without_grad=by_cpu_kernel),
    ops.linear_dense.default: Operator(grouped_flops, without_grad=by_cpu_kernel),
    ops.cached_attention.default: Operator(cached_attention_flops),
    ops.grouped_outer.default: Operator(grouped_flops, waits=goes_group_by_group),
    ops.attention.default: Operator(attention_flops),
    ops.attention_backward.default: Operator(attention_backward_flops),
    ops.linear_cross_entropy.default: Operator(
        loss_flops, loss_workspace, loss_without_grad, waits=always
    ),
    ops.mask_kind.default: Operator(waits=always),
    ops.mask_sequences.default: Operator(waits=always),
    ops.masked_rows.default: Operator(),
    ops.rows_at.default: Operator(),
    aten.masked_scatter.default: Operator(waits=always),  # its backward counts the mask
    ops.rolled.default: Operator(),
    ops.unrolled.default: Operator(),
}
"""Every other operator counts as free: pointwise work, and what has no formula yet (convolutions, recurrences)."""
UNKNOWN = Operator()


def operator_of(node: fx.Node) -> Operator:
    return OPERATORS.get(node.target, UNKNOWN)


INDEXING = frozenset({aten.index.Tensor, aten._unsafe_index.Tensor})
"""How many elements they take is known beforehand if no index is boolean."""


def is_boolean(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def waits(node: fx.Node) -> bool:
    """True if a call waits for the device: to know what it has computed, or how large that is."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace == "qlora_fx" and node.target not in OPERATORS:
        return True  # nothing is known of it
    if node.target in INDEXING:
        indices = arguments(node)["indices"]
        return any(is_boolean(n) for n in indices if n is not None)
    data = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return operator_of(node).waits(node) or bool(data.intersection(node.target.tags))
