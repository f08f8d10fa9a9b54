"""LoRA of which each row of a batch chooses one (PEFT's ``adapter_names``); twin/adapter_rows.py has its values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...errors import InputError
from ..graph.nodes import CASTS, VIEWS, Emitter, aten, cast
from ..graph.site import Site, is_flipped
from .adapter import Adapter, AdapterTensor, Product, branch_dtype, tensor_key
from .lora import lora_shapes

A, B = "lora_A_stack", "lora_B_stack"
SLOT_OF_ROW = "slot_of_row"
"""The input that tells it, int64 ``[batch]``."""


class LoraOfRows(Adapter):
    """``(x[i] A[k]^T) B[k]^T`` for each row ``i`` of a batch, whose slot ``k`` says which adapter it has.

    All slots of a site are of one rank; smaller adapters end in zeros, and ``B`` has the scaling in it. Slots are read, not
    trained.

    Args:
        slots: how many adapters a stack holds.
    """

    roles = (A, B)

    def __init__(self, slots: int) -> None:
        self.slots = slots

    def tensors(self, site: Site) -> dict[str, AdapterTensor]:
        """``[slots, r, in]`` and ``[slots, out, r]``."""
        first, second = (shape[:2] for shape in lora_shapes(site))
        return {
            role: AdapterTensor(tensor_key(site, role), (self.slots, *shape))
            for role, shape in ((A, first), (B, second))
        }

    def emit(self, product: Product, held: Mapping[str, fx.Node], then: Emitter) -> fx.Node:
        """Two batched products with what each row's slot holds.

        Raises:
            InputError: the site multiplies something else than rows of the batch.
        """
        site, result, slot_of_row = product.site, product.result, product.slot_of_row
        assert slot_of_row is not None
        graph, name, like = then.graph, then.name, then.like
        if not has_rows(product.x, slot_of_row):
            raise InputError(
                f"adapter_names cannot be used with adapters of {site.name}, whose input {list(product.x.meta['val'].shape)} "
                "is not the rows of the batch one after another; accepted: adapters whose target_modules leave it out"
            )
        dtype = branch_dtype(result.meta["val"].dtype)
        first, second = (
            cast(
                graph,
                then(
                    aten.index_select.default, held[role], 0, slot_of_row, suffix=f"{role}_of_rows"
                ),
                dtype,
                f"{name}_{role}_low",
                like=like,
            )
            for role in self.roles
        )
        if site.swapped == is_flipped(
            product.view, site
        ):  # as PEFT has them, they multiply from the right
            first, second = (
                then(aten.transpose.int, factor, 1, 2, suffix=f"{role}_transposed")
                for factor, role in ((first, A), (second, B))
            )
        else:
            first, second = second, first
        if product.view.rows is not None:
            second = then(aten.slice.Tensor, second, 2, *product.view.rows, suffix="lora_b_rows")
        x = cast(graph, product.x, dtype, f"{name}_lora_x", like=like)
        val = product.x.meta["val"]
        whole = val.dim() == 3 and same(val.shape[0], slot_of_row.meta["val"].shape[0])
        if not whole:
            rows = then(aten.sym_size.int, slot_of_row, 0, suffix="rows")
            x = then(aten.reshape.default, x, [rows, -1, int(val.shape[-1])], suffix="lora_x_rows")
        branch = then(aten.bmm.default, x, first, suffix="lora_a")
        branch = then(aten.bmm.default, branch, second, suffix="lora_b")
        if not whole:
            branch = then(aten.view_as.default, branch, result, suffix="lora_tokens")
        branch = cast(graph, branch, result.meta["val"].dtype, f"{name}_lora_result", like=like)
        return then(aten.add.Tensor, result, branch, suffix="adapted")


KEEP_ROWS = (
    VIEWS
    - {
        aten.t.default,
        aten.transpose.int,
        aten.permute.default,
        aten.movedim.int,
        aten.expand.default,
        aten.numpy_T.default,
        aten.matrix_H.default,
        aten.mT.default,
    }
) | CASTS
"""Leave the elements of a tensor in the order in which they lie, or leave some out."""
KEEP_FIRST = frozenset(
    {
        aten.linear.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.dropout.default,
        aten.softmax.int,
    }
)
"""Compute each row of their first argument by itself."""


def has_rows(node: fx.Node, slot_of_row: fx.Node) -> bool:
    """Whether a value has the rows of the batch one after another: ``[batch, ...]``, or ``[batch * tokens, ...]`` made of that."""
    batch = slot_of_row.meta["val"].shape[0]
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dim() < 2:
        return False
    if same(val.shape[0], batch):
        return True
    if not statically_known_true(val.shape[0] % batch == 0) or node.op != "call_function":
        return False
    if node.target in KEEP_ROWS or node.target in KEEP_FIRST:
        before = node.args[0]
        return isinstance(before, fx.Node) and has_rows(before, slot_of_row)
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return False
    long = [n for n in node.all_input_nodes if is_as_long(n, val)]
    return bool(long) and all(has_rows(n, slot_of_row) for n in long)


def is_as_long(node: fx.Node, val: torch.Tensor) -> bool:
    other = node.meta.get("val")
    return (
        isinstance(other, torch.Tensor) and other.dim() == val.dim() and not same(other.shape[0], 1)
    )


def same(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    return bool(statically_known_true(size == other))
