"""How attention is computed. ``qlora_fx::attention`` asks the kernels one after the other.

kernel   what every kernel can do, what is known of masks
onednn   compiled for this machine: oneDNN's block products, without what a mask hides
pytorch  PyTorch's kernel for CPUs, for all that the others decline
cuda     PyTorch's kernels for GPUs: FlashAttention where the mask is causal or made of intervals, the memory-efficient one elsewhere
varlen   masks made of intervals (padding, documents, pictures, windows), as where sequences start
"""

from __future__ import annotations

from torch import Tensor

from ...errors import GraphError
from .cuda import Definition, Efficient, Flash, VarlenFlash
from .kernel import ANY, CAUSAL, Inputs, Kernel, Mask, MaskKind
from .onednn import OneDnn
from .pytorch import PyTorch

__all__ = [
    "ANY",
    "CAUSAL",
    "KERNELS",
    "Inputs",
    "Kernel",
    "Mask",
    "MaskKind",
    "devices",
    "kernel_for",
    "mask_kind_of",
    "prepare",
    "take_sequences",
]

KERNELS: tuple[Kernel, ...] = (
    OneDnn(),
    PyTorch(),
    Flash(),
    VarlenFlash(),
    Efficient(),
    Definition(),
)
"""The first that takes a call's tensors computes it. The last one of each device takes everything there."""


def kernel_for(inputs: Inputs) -> Kernel:
    """The kernel that computes a call.

    Raises:
        GraphError: there is none for its device.
    """
    q = inputs.q
    for kernel in KERNELS:
        if kernel.device == q.device.type and kernel.takes(inputs):
            return kernel
    known = ", ".join(f"{kernel.name} ({kernel.device})" for kernel in KERNELS)
    raise GraphError(
        f"no attention kernel takes {q.dtype} {list(q.shape)} on {q.device}; there are {known}"
    )


def devices() -> frozenset[str]:
    """Types of devices on which every call has a kernel.

    This is all that a pass can ask: sizes are free while it runs, and what a mask holds is seen in the call.
    """
    return frozenset(kernel.device for kernel in KERNELS)


def take_sequences() -> frozenset[str]:
    """Types of devices that have a kernel which asks where a mask's sequences start."""
    return frozenset(kernel.device for kernel in KERNELS if kernel.takes_sequences)


def mask_kind_of(mask: Tensor) -> int:
    """The smallest code of a mask's kinds, of those that kernels on its device make use of; else ``ANY``."""
    codes = [kernel.mask_code(mask) for kernel in KERNELS if kernel.device == mask.device.type]
    return min((code for code in codes if code != ANY), default=ANY)


def prepare(device: str) -> None:
    """Let the kernels of a type of device do beforehand what takes seconds once."""
    for kernel in KERNELS:
        if kernel.device == device:
            kernel.prepare()
