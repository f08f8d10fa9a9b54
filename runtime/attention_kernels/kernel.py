"""What an attention kernel is, and what kernels know of a mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# -- masks -----------------------------------------------------------------------------------------


class MaskKind(NamedTuple):
    """A kind of mask whose values some kernel need not read.

    Attributes:
        code: what ``qlora_fx::mask_kind`` returns for it, above ``ANY``. Kinds have different codes; a mask of several
            kinds has the smallest.
        includes: whether a mask ``[batch or 1, heads or 1, queries, keys]`` is of the kind.
    """

    code: int
    includes: Callable[[Tensor], bool]


def is_causal(mask: Tensor) -> bool:
    """True if a boolean mask is exactly causal. An additive one never is: it may hold a bias."""
    rows, columns = mask.shape[-2:]
    if mask.dtype != torch.bool or rows != columns:
        return False
    causal = torch.ones(rows, columns, dtype=torch.bool, device=mask.device).tril()
    return torch.equal(mask, causal.expand_as(mask))


ANY = 0
"""The code of a mask of no known kind."""
CAUSAL = MaskKind(1, is_causal)


class Mask(NamedTuple):
    """Which keys each query sees.

    Attributes:
        seen: boolean, True where a key is seen, ``[batch or 1, heads or 1, sequence, sequence]``; None: causal.
        kind: what ``Kernel.mask_code`` said, or ``ANY``. A kernel that does not know the kind reads ``seen``.
        cu_seqlens: where its sequences start (varlen.py), for kernels that take them.
    """

    seen: Tensor | None
    kind: int
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor | None, kind: Tensor | None, cu_seqlens: Tensor | None = None) -> Mask:
        """From the arguments of ``qlora_fx::attention``. Causal masks are left out: no kernel need read them."""
        code = ANY if kind is None else int(kind)
        if mask is None or code == CAUSAL.code:
            return cls(None, CAUSAL.code)
        return cls(mask, code, cu_seqlens)


class Inputs(NamedTuple):
    """One call. ``q``, ``k``, ``v`` and ``scale`` are those of ``qlora_fx::attention``."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float


# -- kernels ---------------------------------------------------------------------------------------


class Kernel(Protocol):
    """One way to compute attention and its gradient. Shapes are those of ``qlora_fx::attention``.

    A kernel keeps nothing from ``forward`` to ``backward``, and either may be another's (settings change in between),
    so all mean the same by the two results of ``forward``:

    - ``out``, ``[batch, heads, sequence, value size]``, of ``empty_output``'s strides and in the dtype of ``q``; zeros
      for a query that sees no key;
    - ``lse``, ``[batch, heads, sequence]``, float32: the natural logarithm of the sum of ``exp(scale * q k^T)`` over the
      keys that are seen. For a query that sees none it is finite or ``+inf``, and ``backward`` does not depend on it.

    Attributes:
        name: for messages.
        device: type of the devices it computes on.
        mask_kinds: those that it makes use of.
        takes_sequences: whether it makes use of where a mask's sequences start.
    """

    name: str
    device: str
    mask_kinds: tuple[MaskKind, ...] = ()
    takes_sequences: bool = False

    def mask_code(self, mask: Tensor) -> int:
        """The smallest code of those of its kinds that a mask is of, or ``ANY``."""
        codes = (kind.code for kind in self.mask_kinds if kind.includes(mask))
        return min(codes, default=ANY)

    def prepare(self) -> None:
        """Do beforehand what takes seconds once, if anything does. May run in a thread."""
        return

    def takes(self, inputs: Inputs) -> bool:
        """True if it computes a call with these tensors on this machine as it is set now.

        Asked before each ``forward`` and each ``backward``, with tensors on its device; a kernel that takes them must
        not fail for what it could have seen here.
        """
        ...

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        ...

    def backward(
        self, inputs: Inputs, out: Tensor, lse: Tensor, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients for ``q``, ``k`` and ``v``: in their shapes and dtypes, contiguous.

        Args:
            out, lse: as any kernel's ``forward`` returned them for these inputs.
            grad: for ``out``, of any strides.
        """
        ...


def empty_output(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised results of ``forward``; ``out`` is a transposed ``[batch, sequence, heads, value size]``."""
    batch, heads, rows, _ = q.shape
    out = q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2)
    return out, q.new_empty(batch, heads, rows, dtype=torch.float32)


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised results of ``backward``."""
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    return dq, dk, dv
