"""Attention on a GPU over masks that hide an interval's surroundings, beside PyTorch's with the same mask.

    python benchmarks/gpu_attention.py [--rounds 7]

Forward and backward of one layer in bfloat16, Llama-3.1-8B's heads (32, 8 for keys, of 128) for text, Qwen2.5-VL's tower's
(16 of 80) for pictures. *mask*: ``scaled_dot_product_attention`` with the boolean mask and repeated keys, as transformers
calls it. *without*: FlashAttention over the same tensors, causal (or everything, for pictures), no mask: what a row of one
sequence costs. Medians of CUDA events in alternating rounds; peak is what a call allocates.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from qlora_fx.runtime import attention as _attention  # noqa: F401 (registers the operators)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import timed

ops: Any = torch.ops.qlora_fx
TEXT, TOWER = (32, 8, 128), (16, 16, 80)


def causal(length: int) -> Tensor:
    i = torch.arange(length, device="cuda")
    return i[:, None] >= i


def together(length: int, parts: int) -> Tensor:
    number = torch.arange(length, device="cuda") * parts // length
    return number[:, None] == number


def padded(rows: int, length: int, left: bool) -> Tensor:
    """Rows of other lengths, down to half."""
    i = torch.arange(length, device="cuda")
    filled = torch.linspace(0, length // 2, rows, device="cuda").long()[:, None, None, None]
    return causal(length) & ((i >= filled) if left else (i < length - filled))


def cases() -> dict[str, tuple[tuple[int, int, int], Callable[[], Tensor]]]:
    def window() -> Tensor:
        i = torch.arange(8192, device="cuda")
        return (causal(8192) & (i[:, None] - 1024 < i))[None, None]

    return {
        "4 x 1024, padded behind": (TEXT, lambda: padded(4, 1024, False)),
        "4 x 4096, padded behind": (TEXT, lambda: padded(4, 4096, False)),
        "4 x 4096, padded in front": (TEXT, lambda: padded(4, 4096, True)),
        "1 x 8192, 8 documents": (TEXT, lambda: (causal(8192) & together(8192, 8))[None, None]),
        "1 x 8192, window of 1024": (TEXT, window),
        "4 pictures of 1024 patches": (TOWER, lambda: together(4096, 4)[None, None]),
        "4 pictures of 4096 patches": (TOWER, lambda: together(16384, 4)[None, None]),
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ms forward + backward")
    print(
        "| case | ours | of it forward | mask | without | x mask | looked at once, ms | ours peak GB | mask peak GB | off |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, ((heads, key_heads, size), make) in cases().items():
        print(row(name, make(), heads, key_heads, size, args.rounds), flush=True)
        torch.cuda.empty_cache()


def row(name: str, mask: Tensor, heads: int, key_heads: int, size: int, rounds: int) -> str:
    rows, _, length, _ = mask.shape

    def given(many: int) -> Tensor:
        made = torch.randn(rows, length, many, size, device="cuda", dtype=torch.bfloat16)
        return made.transpose(1, 2).requires_grad_()

    q, k, v = given(heads), given(key_heads), given(key_heads)
    grad = torch.randn_like(q)
    kind, starts = ops.mask_sequences(mask)
    group, scale, is_causal = heads // key_heads, size**-0.5, name.find("picture") < 0

    def mine() -> Tensor:
        found: Tensor = ops.attention(q, k, v, mask, kind, scale, starts)[0]
        return found

    def with_mask() -> Tensor:
        keys, values = (t.repeat_interleave(group, 1) for t in (k, v))
        return scaled_dot_product_attention(q, keys, values, mask, scale=scale)

    def without() -> Tensor:
        found: Tensor = ops.attention(q, k, v, None, None, scale)[0]
        if not is_causal:
            found = scaled_dot_product_attention(q, k, v, scale=scale)
        return found

    def both(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), (q, k, v), grad)

    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: both(mine),
        "forward": mine,
        "mask": lambda: both(with_mask),
        "without": lambda: both(without),
        "looked": lambda: ops.mask_sequences(mask),
    }
    peaks = {}
    for way, call in ways.items():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peaks[way] = (torch.cuda.max_memory_allocated() - before) / 1e9
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            times[way].append(timed(call))
    ms = {way: statistics.median(t) for way, t in times.items()}
    found = zip(both(mine), both(with_mask), strict=True)
    pairs = [(a.float(), b.float().nan_to_num()) for a, b in found]  # of queries that see nothing
    off = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return (
        f"| {name} | {ms['ours']:.2f} | {ms['forward']:.2f} | {ms['mask']:.2f} | {ms['without']:.2f} | "
        f"{ms['ours'] / ms['mask']:.2f} | {ms['looked']:.2f} | {peaks['ours']:.2f} | {peaks['mask']:.2f} | {off:.1e} |"
    )


if __name__ == "__main__":
    main()
