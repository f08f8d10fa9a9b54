"""New adapters, initialized as PEFT does."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..passes.adapt import lora_keys
from ..weights.base import Base
from .trained import add_trained


def add_adapters(base: Base) -> None:
    """Make ``lora_A`` and ``lora_B`` of each adapted site that has none yet, and the copies that train as they are.

    ``init_lora_weights=True``: A Kaiming-uniform with a = sqrt(5), B zero. ``"gaussian"``: A normal with
    standard deviation 1/r, B zero. ``False``: both Kaiming-uniform, so that the adapter is not a no-op.
    """
    init = base.config.lora.init_lora_weights
    for site in base.sites.values():
        key_a, key_b = lora_keys(site)
        if not site.adapt or key_a in base.store:
            continue
        shape_a, shape_b = site.lora_shapes()
        a = torch.empty(shape_a, device=base.device)
        b = torch.zeros(shape_b, device=base.device)
        if init == "gaussian":
            nn.init.normal_(a, std=1 / site.r)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(b, a=math.sqrt(5))
        base.store.add(key_a, nn.Parameter(a))
        base.store.add(key_b, nn.Parameter(b))
    add_trained(base)
