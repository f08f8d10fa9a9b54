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


@contextlib.contextmanager
def writes_in_order() -> Iterator[None]:
    """Keep Inductor from forgetting what a CPU loop that it changes has to wait for.

    To fuse two loops it may compute one's sizes anew, and what it reads with them; up to 2.13 at least ``buf`` then stands for
    what it was before another kernel adds to it in place, and a later reordering may run the two the other way around, without
    an error (github.com/pytorch/pytorch/issues/185509; pull request 185873 renames where this does). The gradients of A.X K2,
    whose experts add to their input's, were wrong by 1 %.
    """
    from torch._inductor.scheduler import SchedulerNode

    recompute = SchedulerNode.recompute_size_and_body

    def recompute_and_rename(self: Any, *args: Any, **kwargs: Any) -> None:
        recompute(self, *args, **kwargs)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    with mock.patch.object(SchedulerNode, "recompute_size_and_body", recompute_and_rename):
        yield


@contextlib.contextmanager
def averages_at_the_edge() -> Iterator[None]:
    """Keep Inductor from dividing gradients of average pooling by a whole window where the last one is cut off.

    Up to 2.14 at least it does so with ``ceil_mode=True``, without an error (github.com/pytorch/pytorch/issues/198119). PyTorch's own
    kernel is called instead. Gradients of Funnel, which pools its tokens, were wrong by 6 %.
    """
    from torch._inductor import lowering

    def instead(lowered: Any, kernel: Any) -> Any:
        def backward(*args: Any) -> Any:
            ceil_mode, count_include_pad, *divisor = args[5:]
            cut_off = ceil_mode and count_include_pad and divisor in ([], [None])
            return (kernel if cut_off else lowered)(*args)

        return backward

    aten, known = torch.ops.aten, lowering.lowerings
    kernels = {
        aten.avg_pool2d_backward.default: lowering.fallback_avg_pool2d_backward,
        aten.avg_pool3d_backward.default: lowering.fallback_avg_pool3d_backward,
    }
    changed = {op: instead(known[op], kernel) for op, kernel in kernels.items()}
    with mock.patch.dict(known, changed):
        yield


def below_autograd() -> Any:
    """While it holds operators are dispatched past autograd, which is Python for operators of ours."""
    return torch._C._AutoDispatchBelowAutograd()


def unnoticed_by_autograd(tensors: tuple[torch.Tensor, ...]) -> Any:
    """While it holds tensors may be written to; autograd's saved views of them must not be touched."""
    return torch.autograd.grad_mode._unsafe_preserve_version_counter(tensors)
