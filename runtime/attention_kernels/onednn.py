"""Attention in tiles over oneDNN's block matrix products: ``onednn.cpp``, called through ctypes.

It does not read a causal mask, computes no tile that a mask hides, and lets query heads share keys and values. The
file is compiled once per machine with Inductor's settings and kept in Inductor's cache.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from .. import cpu_kernels
from .kernel import CAUSAL, Inputs, Kernel, empty_gradients, empty_output

SUFFIXES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Of the C functions' names."""
LANES = 16
"""Head sizes must be a multiple of it."""


class OneDnn(Kernel):
    """The compiled kernel. It declines without a compiler, or on a CPU whose oneDNN has not the products."""

    name = "onednn"
    device = "cpu"
    mask_kinds = (CAUSAL,)

    def prepare(self) -> None:
        library()

    def takes(self, inputs: Inputs) -> bool:
        q, _, v, _, scale = inputs
        if q.dtype not in SUFFIXES or q.shape[3] % LANES or v.shape[3] % LANES or not q.numel():
            return False
        if scale <= 0:  # the largest score is looked for before it is scaled
            return False
        functions = library()
        return functions is not None and bool(
            getattr(functions, f"has_products_{SUFFIXES[q.dtype]}")()
        )

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        out, lse = empty_output(inputs.q, inputs.v)
        run("forward", inputs, out=out, lse=lse)
        return out, lse

    def backward(
        self, inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = empty_gradients(inputs.q, inputs.k, inputs.v)
        run("backward", inputs, out=out, lse=lse, grad=grad, dq=dq, dk=dk, dv=dv)
        return dq, dk, dv


class Arguments(ctypes.Structure):
    """Mirrors ``Arguments`` in onednn.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "key_heads", "rows", "size")),
        ("value_size", ctypes.c_int64),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in ("q", "k", "v", "out", "grad")),
        ("mask_strides", ctypes.c_int64 * 2),
        ("threads", ctypes.c_int64),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "out", "lse", "grad")),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv")),
    )


def run(direction: str, inputs: Inputs, **others: Tensor) -> None:
    """Call the C function ``forward`` or ``backward`` for inputs that ``OneDnn.takes``.

    Args:
        others: tensors by the names in ``Arguments``; the results among them are written to.

    Raises:
        MemoryError: there is not enough for packed copies of the tensors.
    """
    q, k, v, mask, scale = inputs
    tensors = {"q": q, "k": k, "v": v, **others}
    batch, heads, rows, size = q.shape
    arguments = Arguments(batch, heads, k.shape[1], rows, size, v.shape[3])
    arguments.scale, arguments.threads = scale, torch.get_num_threads()
    for name in ("q", "k", "v", "grad"):
        if name in tensors and (tensors[name].stride(3) != 1 or tensors[name].stride(2) % 2):
            tensors[name] = tensors[name].contiguous()
    for name in ("q", "k", "v", "out", "grad"):
        if name in tensors:
            setattr(arguments, f"{name}_strides", tensors[name].stride()[:3])
    if mask.seen is not None:
        seen = mask.seen
        for dim in (0, 1):
            if seen.stride(dim) == 0:  # expanded
                seen = seen.narrow(dim, 0, 1)
        seen = tensors["mask"] = seen.contiguous()
        strides = (seen.stride(dim) if seen.shape[dim] > 1 else 0 for dim in (0, 1))
        arguments.mask_strides = (ctypes.c_int64 * 2)(*strides)
    for name, tensor in tensors.items():
        setattr(arguments, name, tensor.data_ptr())
    cpu_kernels.run(getattr(library(), f"{direction}_{SUFFIXES[q.dtype]}"), arguments)


def library() -> Any:
    """onednn.cpp, compiled; None where it cannot be."""
    # Conversions to bfloat16 are one instruction then.
    flags = ("-mavx512bf16",) if torch.cpu._is_avx512_bf16_supported() else ()
    return cpu_kernels.compiled("attention_kernels/onednn.cpp", flags)
