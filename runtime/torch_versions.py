"""What differs between the releases of PyTorch that are supported, all of it and only here, and what has no public name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


def with_vectors(load: Any) -> dict[str, Any]:
    """Keywords with which Inductor's ``CppCodeCache.load`` compiles for the CPU's vector instructions.

    Since 2.13 it looks at the source for Inductor's own vector types, where nothing is said; before, it always did.
    """
    said = "needs_vec_isa" in inspect.signature(load).parameters
    return {"needs_vec_isa": True} if said else {}


@contextlib.contextmanager
def no_tiled_outer_loops() -> Iterator[None]:
    """Keep Inductor from fusing CPU loops whose outer levels are vectorized.

    Up to 2.13 at least it keeps what goes from one such loop to the next in a buffer for one outer element, where a
    vector holds several: values of other rows, without an error (github.com/pytorch/pytorch/issues/185702; pull
    request 185855 falls back as this does). SqueezeBERT's gradients were wrong by 5 %.
    """
    from torch._inductor.codegen.cpp import OuterLoopFusedSchedulerNode

    same_loops: Any = OuterLoopFusedSchedulerNode.check_outer_fusion_loop_level_attr

    def may_be_fused(self: Any, kernels: Any, depth: int) -> bool:
        tiled = any(loop.steps != 1 for k in kernels for loop in k.loop_nest.loops[:depth])
        return not tiled and bool(same_loops(self, kernels, depth))

    with mock.patch.object(
        OuterLoopFusedSchedulerNode, "check_outer_fusion_loop_level_attr", may_be_fused
    ):
        yield


def below_autograd() -> Any:
    """While it holds operators are dispatched past autograd, which is Python for operators of ours."""
    return torch._C._AutoDispatchBelowAutograd()


def unnoticed_by_autograd(tensors: tuple[torch.Tensor, ...]) -> Any:
    """While it holds tensors may be written to; autograd's saved views of them must not be touched."""
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(tensors)
