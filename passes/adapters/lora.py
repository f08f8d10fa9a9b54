"""LoRA in a graph (arXiv:2106.09685); qlora_fx/adapters/lora.py has its values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..graph.nodes import Emitter, aten, cast, ops
from ..graph.site import Site, WeightView, is_flipped
from .adapter import Adapter, AdapterTensor, Product, branch_dtype, tensor_key

A, B = "lora_A", "lora_B"


class Lora(Adapter):
    """``scaling * (dropout(x) A^T) B^T``, added to the result."""

    roles = (A, B)

    def tensors(self, site: Site) -> dict[str, AdapterTensor]:
        shapes = zip(self.roles, lora_shapes(site), strict=True)
        return {role: AdapterTensor(tensor_key(site, role), shape) for role, shape in shapes}

    def emit(self, product: Product, held: Mapping[str, fx.Node], then: Emitter) -> fx.Node:
        """For a stack of experts both products are ``qlora_fx.grouped_linear`` over the same groups of rows."""
        site, result = product.site, product.result
        graph, name, like = then.graph, then.name, then.like
        first, second = factors(site, product.view, held[A], held[B], then)
        is_whole = first.op == "placeholder"
        dtype = branch_dtype(result.meta["val"].dtype)
        first = cast(graph, first, dtype, f"{name}_lora_A_low", like=like)
        second = cast(graph, second, dtype, f"{name}_lora_B_low", like=like)
        branch = cast(graph, product.x, dtype, f"{name}_lora_x", like=like)
        if product.dropout > 0:
            branch = then(
                aten.dropout.default, branch, product.dropout, True, suffix="lora_dropout"
            )
        branch = multiply(branch, first, product, then, "lora_a")
        if is_whole:
            branch.meta["lora_a"] = True
        branch = multiply(branch, second, product, then, "lora_b")
        if site.scaling != 1.0:
            branch = then(aten.mul.Tensor, branch, site.scaling, suffix="scaled")
        branch = cast(graph, branch, result.meta["val"].dtype, f"{name}_lora_result", like=like)
        return then(aten.add.Tensor, result, branch, suffix="adapted")


def multiply(x: fx.Node, weight: fx.Node, product: Product, then: Emitter, suffix: str) -> fx.Node:
    if product.ends is None:
        return then(aten.linear.default, x, weight, suffix=suffix)
    return then(ops.grouped_linear.default, x, weight, product.ends, suffix=suffix)


def lora_shapes(site: Site) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``lora_A`` and ``lora_B`` as PEFT holds them.

    ``[r, in]`` and ``[out, r]``; for experts ``[experts * r, in]`` and ``[out, r * experts]``
    (``peft.tuners.lora.layer.ParamWrapper``); for a convolution with its window of ones behind.
    """
    rows, columns = site.out_features, site.in_features
    if site.swapped:
        rows, columns = columns, rows
    n = site.r * max(site.experts, 1)
    window = (1,) * (len(site.layout.view) - 2) if site.kind == "conv" else ()
    return (n, columns, *window), (rows, n, *window)


def factors(
    site: Site, view: WeightView, a: fx.Node, b: fx.Node, then: Emitter
) -> tuple[fx.Node, fx.Node]:
    """``[(experts,) r, in]`` and ``[(experts,) out, r]`` from PEFT's ``lora_A`` and ``lora_B``.

    PEFT holds experts as ``[experts * r, in]`` and ``[out, r * experts]``, and a parameter that the model
    multiplies transposed with the roles of the two exchanged (``peft.tuners.lora.layer.ParamWrapper``).
    """
    (rows, columns, *window), (out, *_) = lora_shapes(site)
    if window:
        a = then(aten.reshape.default, a, [rows, columns], suffix="lora_a_matrix")
        b = then(aten.reshape.default, b, [out, rows], suffix="lora_b_matrix")
    if site.experts:
        a = then(aten.reshape.default, a, [site.experts, site.r, columns], suffix="lora_a_stack")
        b = then(aten.reshape.default, b, [out, site.r, site.experts], suffix="lora_b_stack")
        b = then(aten.permute.default, b, [2, 0, 1], suffix="lora_b_stack")
        if view.expert is not None:
            a = then(aten.select.int, a, 0, view.expert, suffix="lora_a_expert")
            b = then(aten.select.int, b, 0, view.expert, suffix="lora_b_expert")
    if site.swapped != is_flipped(view, site):
        a, b = (
            then(aten.transpose.int, factor, -2, -1, suffix=f"{which}_swapped")
            for factor, which in ((b, "lora_b"), (a, "lora_a"))
        )
    if view.rows is not None:
        b = then(aten.slice.Tensor, b, 0, *view.rows, suffix="lora_b_rows")
    return a, b
