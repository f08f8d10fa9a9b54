"""What a model holds all the time, from its graph and the rules of storage; no weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..capture.skeleton import named_tensors
from ..compiler.compile import Prepared
from ..errors import ConfigError
from ..passes.adapters import ADAPTER_DTYPE
from ..runtime.flat_update import BLOCK, padded
from ..runtime.optimizer import PAGED

STATES = {"AdEMAMix": 3, "Adam": 2, "Lion": 1}
"""Moments that an optimizer keeps per parameter, by a part of its name."""
SMALLEST_8BIT = 4096
"""Elements; smaller parameters keep their state in 32 bits (bitsandbytes 0.50, ``min_8bit_size``)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes held throughout training, by kind.

    Attributes:
        storage: weights in 4 bits, with their absmax.
        constants: everything else of the model: embeddings, head, norms, biases, buffers.
        adapters, gradients, optimizer: of ``lora_A`` and ``lora_B``, and of copies that train beside them.
        weights: how many weights are in ``storage``.
        parameters: of the whole model, without adapters.
        trained: adapter parameters.
    """

    storage: int
    constants: int
    adapters: int
    gradients: int
    optimizer: int
    weights: int
    parameters: int
    trained: int

    @property
    def total(self) -> int:
        return self.storage + self.constants + self.adapters + self.gradients + self.optimizer


def footprint(prepared: Prepared, optimizer: str) -> Footprint:
    """Count what ``prepared`` will hold with ``optimizer`` over the adapters."""
    base = prepared.base
    skeleton = base.skeleton
    quantized = base.quantized_sites()
    storage = weights = 0
    shared: dict[str, int] = {}
    for site in quantized.values():
        for name, part in base.scheme.parts(site.shape, name=site.name).items():
            if part.shared:
                shared[name] = part.nbytes
            else:
                storage += part.nbytes
        weights += math.prod(site.shape)
    distinct = {skeleton.keys[name]: tensor for name, tensor in named_tensors(skeleton.model)}
    constants = sum(shared.values())
    constants += sum(t.nbytes for key, t in distinct.items() if key not in quantized)
    constants += sum(t.nbytes for t in prepared.capture.constants.values())
    adapted = [site for site in base.sites.values() if site.adapt]
    tensors_of = base.adapter.tensors
    sizes = [math.prod(t.shape) for site in adapted for t in tensors_of(site).values()]
    places = {key: name for name, key in skeleton.keys.items()}
    tensors = dict(named_tensors(skeleton.model))
    sizes += [tensors[places[key]].numel() for key in base.trained.values()]
    held = sum(padded(n) for n in sizes) * ADAPTER_DTYPE.itemsize
    parameters = {skeleton.keys[name] for name, _ in skeleton.model.named_parameters()}
    return Footprint(
        storage=storage,
        constants=constants,
        adapters=held,
        gradients=held,
        optimizer=state_bytes(optimizer, sizes),
        weights=weights,
        parameters=sum(distinct[key].numel() for key in parameters),
        trained=sum(sizes),
    )


def state_bytes(optimizer: str, sizes: list[int]) -> int:
    """Bytes of optimizer state for float32 parameters of these sizes, each padded to whole blocks of 256.

    32 bits: 4 bytes per moment. 8 bits: 1 byte per moment and one float32 scale per block, and a map of 256 float32
    per kind of moment, signed or not (arXiv:2110.02861); small parameters keep 32 bits.

    Raises:
        ConfigError: for an optimizer that ``paged_optimizer`` does not make.
    """
    if optimizer not in PAGED:
        raise ConfigError(f"optimizer={optimizer!r}; accepted: {', '.join(PAGED)}")
    moments = next(n for part, n in STATES.items() if part in optimizer)
    if not optimizer.endswith("8bit"):
        return 4 * moments * sum(padded(n) for n in sizes)
    small = sum(n for n in sizes if n < SMALLEST_8BIT)
    large = sum(padded(n) for n in sizes if n >= SMALLEST_8BIT)
    maps = min(moments, 2) * 4 * 256 if large else 0
    return moments * (4 * small + large + 4 * large // BLOCK) + maps
