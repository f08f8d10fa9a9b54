"""The attention kernel as lesser CPUs would run it; prints one JSON line per level. Run by test_attention.py.

oneDNN reads its level once per process, so each is a fork that has computed nothing yet. ATen reads its own when it is
imported: whoever runs this sets ``ATEN_CPU_CAPABILITY``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from qlora_fx.runtime.attention import attention
from qlora_fx.runtime.attention_kernels import Inputs, Mask
from qlora_fx.runtime.attention_kernels.onednn import OneDnn

LEVELS = ("SSE41", "AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX")


def measure(dtype: torch.dtype) -> dict[str, Any]:
    """Whether the compiled kernel is used, and relative errors of the result and of the queries' gradient."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, 70, 32, generator=generator).to(dtype).requires_grad_()
        for heads in (6, 2, 2)
    )
    out, _ = attention(q, k, v, None, None, 0.3)
    (grad,) = torch.autograd.grad(out.float().square().sum(), q)
    plain = [t.detach() for t in (q, k, v)]
    takes = OneDnn().takes(Inputs(*plain, Mask.of(None, None), 0.3))
    wide = [t.double().requires_grad_() for t in plain]
    true = torch.nn.functional.scaled_dot_product_attention(
        wide[0],
        *(t.repeat_interleave(3, 1) for t in wide[1:]),
        is_causal=True,
        scale=0.3,
    )
    (true_grad,) = torch.autograd.grad(true.square().sum(), wide[0])
    pairs = ((out, true), (grad, true_grad))
    errors = [float((a.double() - b).norm() / b.norm()) for a, b in pairs]
    return {"compiled": takes, "errors": errors}


def main() -> None:
    for level in LEVELS:
        sys.stdout.flush()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        os.environ["ONEDNN_MAX_CPU_ISA"] = level
        found = {str(d): measure(d) for d in (torch.float32, torch.bfloat16)}
        capability = torch.backends.cpu.get_cpu_capability()
        print(json.dumps({"level": level, "capability": capability, **found}))
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
