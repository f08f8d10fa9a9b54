"""convolutions: in forms that compile once for every length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from ..config import Config
from .graph.nodes import Emitter, arguments, aten, cast, ops
from .loss_head import trains

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)
SHORT = 8
"""Widest window of a depthwise convolution that is written out as a sum; state-space models have 3 or 4."""


def convolutions(gm: fx.GraphModule, *, config: Config) -> PassResult:
    """Write short depthwise convolutions out as sums; keep all others whole.

    Inductor fuses the sum, forward and backward, with what stands around it: a depthwise convolution is pointwise
    work. The others become ``qlora_fx.convolution``, for Inductor's own backward of a convolution is compiled
    again for every length of the input.

    Before::

        %conv: f32[B, 8, S + 2] = aten.conv1d(%x, %conv_weight, None, [1], [2], [1], 8)

    After::

        %conv_padded: f32[B, 8, S + 4] = aten.constant_pad_nd(%x, [2, 2])
        %conv_shifted: f32[B, 8, S + 2] = aten.slice(%conv_padded, 2, 0, -2)
        %conv_tap: f32[8, 1] = aten.slice(%conv_taps, 1, 0, 1)
        %conv_part: f32[B, 8, S + 2] = aten.mul(%conv_shifted, %conv_tap)
        ...
    """
    graph = gm.graph
    modified = False
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in CONVOLUTIONS:
            modified |= rewrite(graph, node)
    if modified:
        graph.eliminate_dead_code()
    return PassResult(gm, modified)


def rewrite(graph: fx.Graph, node: fx.Node) -> bool:
    args = arguments(node)
    x, weight = args["input"], args["weight"]
    sizes = weight.meta["val"].dim() - 2
    if args.get("transposed") or x.meta["val"].dim() != sizes + 2:
        return False  # an unbatched input
    if any(trains(args[name]) for name in ("weight", "bias")):
        return False  # the operator has no gradient for them
    stride, dilation = (per_size(args[name], sizes) for name in ("stride", "dilation"))
    emit = Emitter(graph, node)
    with graph.inserting_before(node):
        padding = args["padding"]
        if isinstance(padding, str):
            x, padding = padded_by_name(emit, x, weight, padding, dilation)
        padding = per_size(padding, sizes)
        if is_short(x, weight, stride, dilation, args["groups"]):
            new = as_sum(graph, emit, x, weight, args["bias"], padding[0])
        else:
            last = is_channels_last(node.meta["val"])
            options = (stride, padding, dilation, args["groups"], *([True] if last else []))
            new = emit(ops.convolution.default, x, weight, args["bias"], *options, suffix="whole")
    if "skipped" in node.meta:  # its row in explain
        new.meta["skipped"] = node.meta["skipped"]
    node.replace_all_uses_with(new)
    return True


def is_channels_last(result: torch.Tensor) -> bool:
    """Whether what follows was captured with a result whose channels are innermost, and would be another graph if they were not."""
    strides = result.stride()
    return len(strides) > 3 and isinstance(strides[1], int) and strides[1] == 1 != strides[-1]


def per_size(value: int | Sequence[int], sizes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * sizes if len(values) == 1 else values


def padded_by_name(
    emit: Emitter, x: fx.Node, weight: fx.Node, name: str, dilation: list[int]
) -> tuple[fx.Node, int]:
    """The input as padding ``"same"`` wants it: the odd one of an even window goes behind."""
    if name == "valid":
        return x, 0
    ends: list[int] = []
    for window, d in zip(reversed(weight.meta["val"].shape[2:]), reversed(dilation), strict=True):
        total = d * (int(window) - 1)
        ends += [total // 2, total - total // 2]
    return emit(aten.constant_pad_nd.default, x, ends, suffix="same"), 0


def is_short(
    x: fx.Node, weight: fx.Node, stride: list[int], dilation: list[int], groups: int
) -> bool:
    shape = weight.meta["val"].shape
    channels = x.meta["val"].shape[1]
    return (
        len(shape) == 3
        and stride == dilation == [1]
        and not isinstance(channels, torch.SymInt)
        and groups == channels == shape[0]
        and shape[2] <= SHORT
    )


def as_sum(
    graph: fx.Graph,
    emit: Emitter,
    x: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    padding: int,
) -> fx.Node:
    """``sum_k weight[:, k] * x[..., k:]``, in float32 as the convolution's own kernel adds up."""
    dtype, wide = x.meta["val"].dtype, torch.float32
    name, width = emit.name, int(weight.meta["val"].shape[2])
    x = cast(graph, x, wide, f"{name}_wide", like=emit.like)
    if padding:
        x = emit(aten.constant_pad_nd.default, x, [padding, padding], suffix="padded")
    taps = cast(graph, weight, wide, f"{name}_weight_wide", like=emit.like)
    taps = emit(aten.select.int, taps, 1, 0, suffix="taps")
    total: fx.Node | None = None
    for k in range(width):
        stop = k + 1 - width or 2**63 - 1
        shifted = emit(aten.slice.Tensor, x, 2, k, stop, suffix="shifted")
        tap = emit(aten.slice.Tensor, taps, 1, k, k + 1, suffix="tap")
        part = emit(aten.mul.Tensor, shifted, tap, suffix="part")
        total = part if total is None else emit(aten.add.Tensor, total, part, suffix="sum")
    assert total is not None
    if bias is not None:
        bias = cast(graph, bias, wide, f"{name}_bias_wide", like=emit.like)
        column = emit(aten.unsqueeze.default, bias, 1, suffix="bias")
        total = emit(aten.add.Tensor, total, column, suffix="biased")
    return cast(graph, total, dtype, f"{name}_result", like=emit.like)
