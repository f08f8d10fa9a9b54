"""Loading a checkpoint to 4 bits: time and peak memory beside transformers + bitsandbytes, and the bound.

    python benchmarks/loading.py                 # generates 3.6 GB in several shards, loads it with both
    python benchmarks/loading.py --model folder  # a checkpoint of yours
    python benchmarks/loading.py --merge         # saves and merges what was loaded
    python benchmarks/loading.py --trace         # traces a Llama-3-70B-shaped model without weights

Each stack runs in a process of its own, one after the other, each once before it is measured, so that the files are in
the page cache for all. Peak memory is the kernel's (VmHWM), counted from after the imports. The bound is what the model
holds in the end, plus the largest tensor of the files, plus 10 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(
    Path(__file__).resolve().parent.parent
)  # this folder's profile.py would hide Python's own
GB = 1e9
SIZES = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "vocab_size": 32000,
    "pad_token_id": 0,
}
"""1.78 billion parameters."""
LLAMA_3_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
"""The public config.json of meta-llama/Meta-Llama-3-70B."""
STACKS = {
    "ours": "qlora_fx.from_pretrained, its defaults",
    "ours-eager": "the same, backend='eager'",
    "transform": "transformers in 16 bits, then qlora_fx.transform",
    "reference": "transformers + bitsandbytes, its defaults",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a folder; default: a random Llama is generated")
    parser.add_argument("--stacks", nargs="+", default=list(STACKS), choices=STACKS)
    parser.add_argument("--rounds", type=int, default=2, help="the last of them counts")
    parser.add_argument("--trace", action="store_true", help="trace the 70B config instead")
    parser.add_argument("--merge", action="store_true", help="save and merge instead of loading")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        work = {"trace": lambda: trace(), "write": lambda: write(args.model)}
        print(json.dumps(work.get(args.child, lambda: measure(args.child, args.model))()))
        return
    if args.trace:
        t = child("trace", Path())
        print(
            f"Llama-3-70B's config, 80 layers, to a graph that is ready to be lowered: {t['seconds']:.1f} s, "
            f"{t['peak'] / GB:.2f} GB above the {t['idle'] / GB:.2f} GB after imports; {t['nodes']} nodes, "
            f"{t['bodies']} bodies, graph text of {t['lines']} lines"
        )
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or generate(Path(scratch) / "model")
        if args.merge:
            report_writing(folder)
        else:
            report(folder, args.stacks, args.rounds)


def report_writing(folder: Path) -> None:
    print("| what is written | s | GB written | peak GB above the loaded model |")
    print("|---|---|---|---|")
    for row in child("write", folder)["rows"]:
        print(
            f"| {row['name']} | {row['seconds']:.1f} | {row['bytes'] / GB:.2f} | {row['peak'] / GB:.2f} |"
        )


def report(folder: Path, stacks: list[str], rounds: int) -> None:
    from qlora_fx.checkpoints.locate import find

    entries = find(folder).entries.values()
    total, largest = sum(e.nbytes for e in entries), max(e.nbytes for e in entries)
    files = len({e.file for e in entries})
    print(
        f"{total / GB:.2f} GB in {files} files, the largest tensor {largest / GB:.2f} GB; all in the page cache\n"
    )
    print(
        "| stack | load s | of it filling s | held GB | peak GB above idle | bound GB | x bound |"
    )
    print("|---|---|---|---|---|---|---|")
    for stack in stacks:
        for _ in range(rounds):
            result = child(stack, folder)
        bound = (result["held"] + largest) * 1.1
        filling = f"{result['filling']:.1f}" if result.get("filling") else ""
        print(
            f"| {STACKS[stack]} | {result['seconds']:.1f} | {filling} | {result['held'] / GB:.2f} | "
            f"{result['peak'] / GB:.2f} | {bound / GB:.2f} | {result['peak'] / bound:.2f} |",
            flush=True,
        )


def child(stack: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", stack, "--model", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def generate(folder: Path) -> Path:
    """A random Llama in bfloat16, in shards of 1 GB."""
    import torch
    from qlora_fx.runtime.checkpoint_writer import FolderWriter, Spec
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SIZES, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)
    with FolderWriter(folder) as writer:
        writer.text("config.json", config.to_json_string())
        specs = [Spec(n, torch.bfloat16, tuple(t.shape)) for n, t in state.items()]
        writer.tensors(specs, max_shard_size=10**9)
        for spec in specs:
            values = torch.empty(spec.shape, dtype=torch.bfloat16)
            writer.put(spec.name, values.normal_(std=0.02, generator=generator))
    return folder


def status(field: str) -> int:
    """Bytes from ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(stack: str, folder: Path) -> dict[str, Any]:
    """Load in this process."""
    import qlora_fx
    import torch
    from qlora_fx import from_pretrained as loading
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    result: dict[str, Any] = {}
    original = loading.fill

    def timed(*args: Any, **options: Any) -> None:
        start = time.perf_counter()
        original(*args, **options)
        result["filling"] = time.perf_counter() - start

    loading.fill = timed
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    idle, start = status("VmRSS"), time.perf_counter()
    model: Any
    if stack.startswith("ours"):
        backend = "eager" if stack == "ours-eager" else "inductor"
        model = qlora_fx.from_pretrained(folder, backend=backend, progress=False)
    elif stack == "transform":
        model = qlora_fx.transform(AutoModelForCausalLM.from_pretrained(folder))
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    seconds = time.perf_counter() - start
    peak = status("VmHWM")
    tensors = [*model.parameters(), *model.buffers()]
    held = sum(t.nbytes for t in tensors)
    for t in tensors:  # bitsandbytes keeps these outside of parameters
        state = getattr(t, "quant_state", None)
        if state is not None:
            held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert all(isinstance(t, torch.Tensor) for t in tensors)
    return result | {"seconds": seconds, "idle": idle, "peak": peak - idle, "held": held}


def write(folder: Path) -> dict[str, Any]:
    """Save and merge in this process; each peak counts from where its write began."""
    import qlora_fx
    from peft import LoraConfig
    from qlora_fx.runtime.allocator import trim

    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    qmodel = qlora_fx.from_pretrained(folder, lora, backend="eager", progress=False)
    rows = []
    modes = ("dequantized", "base16", "requantized")
    for name in ("save_quantized", *modes, *(f"{m}, sample=False" for m in modes)):
        with tempfile.TemporaryDirectory() as scratch:
            gc.collect()
            trim()  # what the row before left free would hide what this one takes
            Path("/proc/self/clear_refs").write_text("5")
            before, start = status("VmRSS"), time.perf_counter()
            if name == "save_quantized":
                qmodel.save_quantized(Path(scratch) / "out")
            else:
                mode, *rest = name.split(",")
                report = qmodel.merge(Path(scratch) / "out", mode, sample=False if rest else None)
                if not rest:
                    print(report, file=sys.stderr)
            rows.append(
                {
                    "name": name if name == "save_quantized" else f"merge, {name}",
                    "seconds": time.perf_counter() - start,
                    "peak": status("VmHWM") - before,
                    "bytes": sum(f.stat().st_size for f in (Path(scratch) / "out").iterdir()),
                }
            )
    return {"rows": rows}


def trace() -> dict[str, Any]:
    """Prepare a model of Llama-3-70B's shape: no weight exists."""
    import torch
    from qlora_fx.checkpoints.empty_model import build
    from qlora_fx.checkpoints.locate import Source
    from qlora_fx.compiler import printer
    from qlora_fx.compiler.compile import prepare
    from qlora_fx.compiler.request import Request
    from transformers import LlamaConfig, LlamaForCausalLM

    request = Request.check(compute_dtype="bfloat16")
    Path("/proc/self/clear_refs").write_text("5")
    idle, start = status("VmRSS"), time.perf_counter()
    config = LlamaConfig(**LLAMA_3_70B)
    model = build(config, LlamaForCausalLM, torch.bfloat16, Source("", Path()))
    prepared = prepare(model, request, torch.device("cpu"))
    seconds = time.perf_counter() - start
    gm = prepared.result.gm
    bodies = [m for m in gm.children() if isinstance(m, torch.fx.GraphModule)]
    return {
        "seconds": seconds,
        "idle": idle,
        "peak": status("VmHWM") - idle,
        "nodes": len(prepared.result.flat.graph.nodes),
        "bodies": len(bodies),
        "lines": len(printer.text(gm).splitlines()),
    }


if __name__ == "__main__":
    main()
