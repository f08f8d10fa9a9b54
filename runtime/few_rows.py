"""Products of few rows on a CPU: where a weight is read once, by a kernel of ours, as it lies in memory.

# Note [Products of few rows]
In training a weight is multiplied by hundreds of rows: making it dense, in storage that stays in no cache, costs little
beside the product. A token that is generated has one row, and most of its time went to writing dense weights and reading
them again. PyTorch's own products with a dense weight, too, take two to five times as long as reading it for 2 to 16
rows of float32. So ``few_rows.cpp`` has both, for up to ``FEW`` rows.

They are operators of a library of their own (``torch.ops.qlora_fx_cpu``), compiled once per machine with Inductor's
settings and kept in Inductor's cache. ``qlora_fx::linear_4bit`` and ``qlora_fx::linear_dense`` call them; a compiled
graph without gradients calls them itself (passes/lowering/operators.py), past Python. More rows go back to the operators
of that name, which know what to do.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from . import cpu_kernels
from .ops import dequantized

FEW = 16
"""Rows up to which the kernels multiply; as in few_rows.cpp."""
STEP = 32
"""Values in 4 bits that are looked up at a time; as in few_rows.cpp."""
WIDTH = 16
"""Rows of a dense weight must be a multiple of it."""
DTYPES = (torch.float32, torch.bfloat16)
"""Of rows and bias; a dense weight is in float32. Products with one in bfloat16 are oneDNN's, by instructions of their own."""


def kernels() -> Any:
    """``torch.ops.qlora_fx_cpu``; None where it cannot be compiled."""
    library = cpu_kernels.compiled("few_rows.cpp", cpu_kernels.FUSED)
    return None if library is None else prepared(library)


@functools.cache
def prepared(library: Any) -> Any:
    levels = torch.cat([levels_of(quant_type) for quant_type in ("nf4", "fp4")])
    library.set_levels(ctypes.c_void_p(levels.data_ptr()))
    torch.library.register_fake("qlora_fx_cpu::linear_4bit")(lambda x, *a: empty(x, a[9][0]))
    torch.library.register_fake("qlora_fx_cpu::linear_dense")(lambda x, w, *_: empty(x, w.shape[0]))
    return torch.ops.qlora_fx_cpu


def empty(x: Tensor, out: int) -> Tensor:
    """The result of a product, without its values."""
    return x.new_empty(*x.shape[:-1], out)


def levels_of(quant_type: str) -> Tensor:
    """The 16 values that codes stand for, as bitsandbytes dequantizes them."""
    codes = torch.arange(0, 16, 2, dtype=torch.uint8) * 16 + torch.arange(1, 16, 2)
    codes = torch.cat([codes, codes.new_zeros(24)]).to(torch.uint8)[:, None]
    dense = dequantized(codes, torch.ones(1), 64, quant_type, [1, 64], torch.float32)
    return dense[0, :16].clone()


def are_few(x: Tensor, size: int) -> bool:
    """Whether a kernel takes the rows of ``x``: on a CPU, and not too many."""
    return x.device.type == "cpu" and x.shape[-1] == size and 0 < x.numel() // size <= FEW


def takes_4bit(size: int, blocksize: int) -> bool:
    """Whether a kernel takes a weight in 4 bits with rows of ``size``."""
    return size % STEP == 0 and blocksize % STEP == 0


def takes_dense(size: int, dtype: torch.dtype) -> bool:
    """Whether a kernel takes a dense weight with rows of ``size``."""
    return size % WIDTH == 0 and dtype == torch.float32


def in_float32(*tensors: Tensor | None) -> list[Tensor | None]:
    """As the kernels read them: a tensor that is not contiguous they would send back here."""
    return [None if t is None else t.float().contiguous() for t in tensors]
