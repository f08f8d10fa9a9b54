"""What an adapter is in a graph: its tensors, and the nodes that join it to a product."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from ..graph.nodes import Emitter
from ..graph.site import Site, WeightView

ADAPTER_DTYPE = torch.float32
"""Adapters are stored in float32, as PEFT does by default."""


def branch_dtype(activations: torch.dtype) -> torch.dtype:
    """The dtype of the branch's products: that of the activations, whose rounding it joins, but never float16.

    In bfloat16 our error beside float64 is no larger than PEFT's with float32 products (tests/peers): what
    the products round, the activations have rounded before. float16 has too little range for gradients.
    """
    return torch.bfloat16 if activations == torch.bfloat16 else ADAPTER_DTYPE


@dataclass(frozen=True)
class AdapterTensor:
    """One trained tensor of a site: its store key, and its shape as PEFT holds it."""

    key: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """What an adapter is joined to.

    Attributes:
        node: the product with the frozen weight.
        site: its verdict.
        view: how it reads the parameter.
        x: its input as the model computed it, in the activations' dtype.
        result: its result in that dtype; ``node`` itself, or a cast.
        ends: where each expert's rows end; None for an ordinary linear.
        dropout: probability, 0 outside of training.
        slot_of_row: int64 ``[batch]``, where rows have adapters of their own: which each has.
    """

    node: fx.Node
    site: Site
    view: WeightView
    x: fx.Node
    result: fx.Node
    ends: fx.Node | None
    dropout: float
    slot_of_row: fx.Node | None = None


class Adapter(Protocol):
    """One kind of adapter. Its values are handled by ``qlora_fx/adapters``.

    Attributes:
        roles: PEFT's names of its tensors (``lora_A``), which are part of their keys.
    """

    roles: tuple[str, ...]

    def tensors(self, site: Site) -> dict[str, AdapterTensor]:
        """What is trained for a site, by role."""
        ...

    def emit(self, product: Product, held: Mapping[str, fx.Node], then: Emitter) -> fx.Node:
        """The nodes from a product's result to the adapted one, which is returned, in the result's dtype.

        The node that is returned reads the result itself; others may. The result has the product's bias in it.
        What depends on storage and the adapter alone is recomputed in backward wherever it stands. The first
        product of the adapter with a whole tensor of its own gets ``meta["lora_a"]``: siblings stacks those.

        Args:
            held: the placeholders of ``tensors(site)``.
        """
        ...


def tensor_key(site: Site, role: str) -> str:
    """Store key of a site's tensor.

    ``<module>.<role>.weight``; for a parameter of a module that is no linear, ``<module>.<role>.<parameter>``.
    """
    if site.kind in ("linear", "conv"):
        return f"{site.name}.{role}.weight"
    owner, _, leaf = site.weight.rpartition(".")
    return ".".join(filter(None, (owner, role, leaf)))
