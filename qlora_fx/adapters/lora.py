"""LoRA's values; passes/adapters/lora.py has its nodes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from ..passes.adapters.lora import A, B
from ..passes.graph.site import Site
from ..weights.base import Base
from .values import AdapterValues


class LoraValues(AdapterValues):
    def initialize(self, base: Base, site: Site) -> dict[str, torch.Tensor]:
        """As PEFT does.

        ``init_lora_weights=True``: A Kaiming-uniform with a = sqrt(5), B zero. ``"gaussian"``: A normal with
        standard deviation 1/r, B zero. ``False``: both Kaiming-uniform, so that the adapter is not a no-op.
        """
        init = base.config.lora.init_lora_weights
        tensors = base.adapter.tensors(site)
        a = torch.empty(tensors[A].shape, device=base.device)
        b = torch.zeros(tensors[B].shape, device=base.device)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / site.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        return {A: a, B: b}

    def merged(
        self, rows: Iterator[torch.Tensor], base: Base, site: Site, expert: int | None
    ) -> Iterator[torch.Tensor]:
        """``rows + scaling * B A``."""
        a, b = factors(base, site)
        if expert is not None:
            a, b = a[expert], b[expert]
        at = 0
        for part in rows:
            part.addmm_(b[at : at + part.shape[0]], a, alpha=site.scaling)
            at += part.shape[0]
            yield part


def factors(base: Base, site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """``[(experts,) r, in]`` and ``[(experts,) out, r]``: as ``passes.adapters.lora.factors``, on tensors."""
    tensors = base.adapter.tensors(site)
    a, b = (base.store[tensors[role].key].detach().float() for role in (A, B))
    a, b = a.reshape(a.shape[0], a.shape[1]), b.reshape(b.shape[0], b.shape[1])
    if site.experts:
        a = a.reshape(site.experts, site.r, a.shape[1])
        b = b.reshape(b.shape[0], site.r, site.experts).permute(2, 0, 1)
    if site.swapped:
        a, b = b.transpose(-2, -1), a.transpose(-2, -1)
    return a, b
