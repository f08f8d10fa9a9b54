"""What a training step launches on a GPU, counted without one, and the time that data sheets allow for it.

    python benchmarks/cuda_cost.py [--models 1b 8b moe] [--shapes 1x512 4x1024 1x4096] [--json cost.json]

Traces a step on fake tensors, lets Inductor write its code for an H100 and counts what that code calls: kernels that Inductor fuses,
products, operators. Attention and the loss run several kernels each; those are counted by hand (``LAUNCHES``). A product counts as one launch,
but cuBLAS makes two of some: *likely* adds what the same count missed of the program that was profiled on an H200 (``SEEN``).
Nothing is run and no time is measured: the estimate is the larger of

- the device: of each launch the larger of operations over peak and bytes over bandwidth, by data sheets;
- the host: launches by the time one took on the H200 of RESULTS.md, for ours and for the reference.

Needs Triton beside PyTorch (``pip install triton``: Inductor asks for it), g++ and no GPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose profile.py would hide Python's own

from benchmarks.fake_gpu import fake_gpu
from benchmarks.gpu import MODELS, RANK


class Device(NamedTuple):
    """Of a data sheet: operations per second on dense bfloat16, bytes per second."""

    operations: float
    bandwidth: float


DEVICES = {
    "A100": Device(312e12, 2.039e12),  # NVIDIA A100 80GB SXM data sheet
    "H100": Device(989e12, 3.35e12),  # NVIDIA H100 SXM data sheet; 1979 is with sparsity
    "H200": Device(989e12, 4.8e12),  # NVIDIA H200 SXM data sheet
    "RTX 4090": Device(165e12, 1.008e12),  # NVIDIA Ada architecture whitepaper, float32 sums
}
SECONDS_PER_LAUNCH = 33e-6
"""Of the host: 84 ms for 2437 launches, 165 for 5029, and 307 for 9230 of the reference (RESULTS.md, 1 x 512)."""


class Seen(NamedTuple):
    """Of a profile of a step on that H200, RESULTS.md.

    Attributes:
        reference: launches of PEFT + bitsandbytes.
        missed: launches of ours that this count missed, of the program of that day: what cuBLAS adds to a product.
    """

    reference: int
    missed: int


SEEN = {
    ("1b", (1, 512)): Seen(4478, 2437 - 2392),
    ("1b", (4, 1024)): Seen(4750, 2685 - 2410),
    ("1b", (1, 4096)): Seen(4749, 2685 - 2410),
    ("8b", (1, 512)): Seen(9230, 5029 - 4760),
    ("8b", (4, 1024)): Seen(10345, 5945 - 4778),
    ("8b", (1, 4096)): Seen(10344, 5945 - 4778),
}
INPUTS = ("input_ids", "attention_mask", "labels")
LAUNCHES = {
    # FlashAttention-2's forward; its backward's three, and the sums of keys' and values' gradients over heads.
    "qlora_fx.attention": 1,
    "qlora_fx.attention_backward": 5,
    # Stacks are dequantized, absmax and then weights, and multiplied.
    "qlora_fx.grouped_linear_4bit": 4,
    "qlora_fx.grouped_linear": 1,
    "qlora_fx.grouped_outer": 1,
}


def loss_launches(rows: int, rows_of_a_chunk: int) -> int:
    """Which rows have a label: four, two zeros, a count. A chunk: two products, the kernel, a sum, an addition, a copy."""
    return 7 + 6 * -(-rows // rows_of_a_chunk)


class Call(NamedTuple):
    """What one call in a compiled graph costs; the words are ``Cost``'s."""

    kind: str
    launches: int
    operations: float
    bytes: float


@dataclass
class Cost:
    """Of some launches.

    Attributes:
        launches: how many.
        operations: multiplications and additions of products.
        bytes: read and written in device memory, if each launch reads what it needs once.
        seconds: on each device, were it never waiting for the host.
        kinds: launches by what they are.
    """

    launches: int = 0
    operations: float = 0
    bytes: float = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(DEVICES, 0.0))
    kinds: Counter[str] = field(default_factory=Counter)

    def add(self, call: Call, times: int) -> None:
        self.launches += times * call.launches
        self.operations += times * call.operations
        self.bytes += times * call.bytes
        self.kinds[call.kind] += times * call.launches
        for device, (peak, bandwidth) in DEVICES.items():
            self.seconds[device] += times * max(call.operations / peak, call.bytes / bandwidth)


def calls(graph: Any, one_row: bool) -> Iterator[Call]:
    """What Inductor has scheduled for one compiled graph.

    Args:
        one_row: the compiler, which is shown two rows at least, saw two of half the length: as many tokens, but
            half of the attention's operations.
    """
    import torch
    from qlora_fx.passes.graph.nodes import arguments
    from qlora_fx.passes.lowering.operators import operator_of
    from qlora_fx.runtime.loss import rows_of_a_chunk
    from torch._inductor import ir
    from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode
    from torch._inductor.virtualized import V

    with V.set_graph_handler(graph):
        for node in graph.scheduler.nodes:
            if isinstance(node, NopKernelSchedulerNode):
                continue
            moved = node.get_read_write_buffers_sizes()
            if not isinstance(node, ExternKernelSchedulerNode):
                yield Call("fused", 1, 0, moved)
                continue
            kernel = node.node
            if isinstance(kernel, ir.MultiOutput):  # a part of what another launch gives
                continue
            operator = getattr(kernel, "op_overload", None)
            name = str(getattr(operator, "_opname", None) or kernel.python_kernel_name)
            if operator is not None and operator.namespace == "qlora_fx":
                name = f"qlora_fx.{name}"
            same = (n for n in kernel.get_origins() if n.target is operator)
            origin = next(same, kernel.get_origin_node())
            formula = 0 if origin is None else operator_of(origin).flops(origin)
            operations = float(graph.sizevars.optimization_hint(formula)) if formula else 0.0
            launches = LAUNCHES.get(name, 1)
            if name == "qlora_fx.linear_cross_entropy":
                args = arguments(origin)
                x = args["x"].meta["val"]
                rows = int(graph.sizevars.optimization_hint(x.shape[0].node.expr))
                chunk = rows_of_a_chunk(args["shape"][0], x.dtype.itemsize, torch.device("cuda"))
                launches = loss_launches(rows, chunk)
            if one_row and "attention" in name:
                operations *= 2
            yield Call(name, launches, operations, moved)


def costs(settings: dict[str, Any], shapes: Sequence[tuple[int, int]]) -> Iterator[Cost]:
    """Forward and backward at each shape of a random Llama, or Qwen3-MoE where there are experts; all rows have labels."""
    import torch
    import transformers
    from peft import LoraConfig
    from qlora_fx.compiler import request
    from qlora_fx.compiler.compile import prepare
    from qlora_fx.passes.lower import lower
    from qlora_fx.passes.lowering import on_gpu
    from qlora_fx.passes.lowering.compiled_body import CompiledBody, Key
    from qlora_fx.runtime.fastest_dtype import ComputeDtype
    from torch._inductor import config as inductor
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind = "Qwen3Moe" if "num_experts" in settings else "Llama"
    config = getattr(transformers, f"{kind}Config")(**settings)
    with torch.device("meta"):
        empty = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    found: list[Call] = []
    generate = GraphLowering.codegen

    def noted(graph: GraphLowering) -> Any:
        code = generate(graph)
        found.extend(calls(graph, shape[0] == 1))
        return code

    def fake_table(*_: Any) -> Any:
        with FakeTensorMode():
            return torch.empty(16, device="cuda:0")

    launchers = ("use_static_triton_launcher", "use_static_cuda_launcher")
    patches = {name: False for name in launchers if hasattr(inductor, name)}
    with (
        fake_gpu(),
        inductor.patch(
            force_disable_caches=True, compile_threads=1, joint_graph_constant_folding=False
        ),
        inductor.patch(patches),
        mock.patch.object(GraphLowering, "codegen", noted),
        mock.patch.object(CompiledBody, "warn_once", refuse),
        mock.patch.object(on_gpu, "table", fake_table),
        mock.patch.object(request, "fastest", return_value=ComputeDtype(torch.bfloat16, "fixed")),
    ):
        with FakeTensorMode():
            ids = {n: torch.ones(3, 21, dtype=torch.int64, device="cuda:0") for n in INPUTS}
        lora = LoraConfig(r=RANK, target_modules="all-linear")
        asked = request.Request.check(lora, None, example_inputs=ids)
        prepared = prepare(empty, asked, torch.device("cuda:0"))
        program = lower(prepared.result.gm)
        for shape in shapes:
            shown = (2, shape[1] // 2) if shape[0] == 1 else shape
            hints = {
                size.node.expr: length
                for node in program.graph.find_nodes(op="placeholder")
                if "input" in node.meta
                for size, length in zip(node.meta["val"].shape, shown, strict=True)
            }
            total = Cost()
            for _, body in program.named_children():
                assert isinstance(body, CompiledBody)
                sizes = tuple(int(size.formula.xreplace(hints)) for size in body.free)
                found.clear()
                body.build(Key(body.flowing if any(body.flowing) else ()), sizes)
                for call in found:
                    total.add(call, body.calls)
            yield total


def refuse(body: Any, error: Exception) -> None:
    raise error


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--shapes", nargs="*", default=["1x512", "4x1024", "1x4096"])
    p.add_argument("--json", type=Path, help="write all figures to this file")
    args = p.parse_args()
    if find_spec("triton") is None:
        p.error("Inductor asks for Triton: pip install triton")
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # Inductor's advice for a GPU that is not there
    shapes = [(int(rows), int(tokens)) for rows, tokens in (s.split("x") for s in args.shapes)]
    figures = []
    head = "| model | batch | counted | likely | of the reference's | TFLOP | GB moved | host ms |"
    print(head + "".join(f" {d} ms |" for d in DEVICES))
    print("|---" * (8 + len(DEVICES)) + "|")
    for model in args.models:
        for (rows, tokens), cost in zip(shapes, costs(MODELS[model], shapes), strict=True):
            seen = SEEN.get((model, (rows, tokens)))
            likely = cost.launches + (seen.missed if seen else 0)
            figures.append({"model": model, "rows": rows, "tokens": tokens, **vars(cost)})
            figures[-1] |= {"likely": likely, "reference": seen.reference if seen else None}
            cells = [
                model,
                f"{rows} x {tokens}",
                str(cost.launches),
                str(likely) if seen else "-",
                f"{likely / seen.reference:.2f}" if seen else "-",
                f"{cost.operations / 1e12:.2f}",
                f"{cost.bytes / 1e9:.1f}",
                f"{1e3 * SECONDS_PER_LAUNCH * likely:.0f}",
                *(f"{1e3 * cost.seconds[d]:.0f}" for d in DEVICES),
            ]
            print("| " + " | ".join(cells) + " |", flush=True)
            if args.json:
                args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
