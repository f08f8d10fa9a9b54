"""Training on a GPU beside PEFT + bitsandbytes: time, memory, launches of a step, and the bound of its products.

    python benchmarks/gpu.py [--models 1b 8b moe] [--rounds 5] [--json figures.json]

Models have the shapes of Llama-3.2-1B, Llama-3.1-8B and six layers of Qwen3-30B-A3B, with random weights in bfloat16:
nothing is downloaded. Each lives in a process of its own with all its stacks, which take turns, one step each, round
after round; the processes compile at the same time and are measured one after the other, with ``--after FILE`` when that file
exists: tests can run until then. A step is forward and backward; an optimizer's is timed apart. Times are of CUDA events.
The bound is the time of the step's matrix products alone on buffers made beforehand (each linear's forward and input
gradient, LoRA's, the head's; no attention). ``--host FOLDER`` writes where Python spends the time of a step and of a token.
``peak`` is torch.cuda.max_memory_allocated above what all stacks hold, ``held`` what a stack holds itself. transformers +
bitsandbytes keeps experts dense and PEFT leaves them without adapters, so that the ``moe`` row has no reference.
``--padded`` pads on the right, as collators do. Our stack is measured twice, launched one by one and with ``cuda_graphs``. Last, generation: milliseconds to the first
token and of each further one. ``--parts steps`` or ``--parts tokens`` measures one of the two.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # not this folder, whose profile.py would hide Python's own

SHAPES = ("1x512", "4x1024", "1x4096")
PROMPT, NEW = 512, 16
GENERATED_ROWS = (1, 8)
RANK = 16
STACKS = ["reference", "reference, checkpointing", "qlora_fx"]
PARTS = ["steps", "tokens"]
MODELS: dict[str, dict[str, Any]] = {
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--json", help="write the figures to this file as they come")
    p.add_argument("--shapes", nargs="*", default=SHAPES, help="rows x tokens of a step")
    p.add_argument("--padded", action="store_true", help="rows of other lengths, down to half")
    p.add_argument("--stacks", nargs="*", default=STACKS, choices=STACKS)
    p.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS, help="what is measured")
    p.add_argument("--after", type=Path, help="measure when this file exists; compile meanwhile")
    p.add_argument("--host", type=Path, help="write profiles of Python to this folder")
    p.add_argument("--worker", choices=list(MODELS), help=argparse.SUPPRESS)
    p.add_argument("--plan", choices=list(MODELS), help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        work(args)
        return
    if args.plan:
        planned(args.plan, args.shapes)
        return
    import torch

    if not torch.cuda.is_available():
        p.error("PyTorch sees no CUDA GPU here")
    found: list[dict[str, Any]] = []
    workers = {name: start(args, "--worker", name) for name in args.models}
    with_plan = args.models if "steps" in args.parts else []
    plans = {name: start(args, "--plan", name) for name in with_plan}
    for process in plans.values():
        lines(process, lambda line: bool(print(line, flush=True)))
    for name, process in workers.items():
        lines(process, lambda line: line == "ready")
        print(f"{name} is ready", flush=True)
        while args.after and not args.after.exists():
            time.sleep(0.5)
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()

        def note(line: str, name: str = name) -> bool:
            print(f"{name} {line}", flush=True)
            if line.startswith("{"):
                found.append({"model": name, **json.loads(line)})
                if args.json:
                    Path(args.json).write_text(json.dumps(found, indent=1))
            return False

        lines(process, note)
        process.wait()
    print(table(found))


def start(args: argparse.Namespace, *what: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, *what, "--rounds", str(args.rounds)]
    command += ["--stacks", *args.stacks, "--parts", *args.parts, "--shapes", *args.shapes]
    if args.padded:
        command.append("--padded")
    if args.host:
        command += ["--host", str(args.host)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def lines(process: subprocess.Popen[str], until: Callable[[str], bool]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if until(line.rstrip("\n")):
            return


def table(found: list[dict[str, Any]]) -> str:
    rows = [
        "| model | batch | stack | step ms (min-max) | tokens/s | x bound | x reference | peak GB | held GB | kernels | launches | waits |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in found:
        if "median_ms" not in f:
            continue
        rows.append(
            f"| {f['model']} | {f['rows']} x {f['tokens']} | {f['stack']} | {f['median_ms']:.1f} "
            f"({f['min_ms']:.1f}-{f['max_ms']:.1f}) | {f['tokens_per_s']:.0f} | {f['x_bound']:.2f} | "
            f"{f.get('x_reference', 0):.2f} | {f.get('peak_gb', 0):.2f} | {f.get('held_gb', 0):.2f} | "
            f"{f.get('launches', '-')} | {f.get('host_launches', '-')} | {f.get('waits', '-')} |"
        )
    return "\n".join(rows)


# -- a model's process -----------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    import torch

    warnings.filterwarnings("ignore")
    name = args.worker
    shapes = sizes(args.shapes)
    run = partial(step_of, padded=args.padded)
    model = dense_model(name)
    stacks: dict[str, Any] = {}
    held: dict[str, float] = {}
    reports: list[dict[str, Any]] = []
    for stack, make in makers(name, args.stacks).items():
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        if stack == "qlora_fx":  # it takes the dense weights over
            before -= sum(p.nbytes for p in model.parameters())
        try:
            stacks[stack] = make(model)
            for parameter_name, parameter in stacks[stack].named_parameters():
                if "lora_B" in parameter_name:  # at zero, lora_A would have no gradient
                    torch.nn.init.normal_(parameter, std=0.02)
            run(stacks[stack], 1, 512)
        except Exception as error:
            reports.append({"stack": stack, "error": f"{type(error).__name__}: {error}"[:400]})
            continue
        torch.cuda.synchronize()
        gc.collect()
        held[stack] = (torch.cuda.memory_allocated() - before) / 1e9
        reports.append({"stack": stack, "first_step_s": round(time.perf_counter() - began, 1)})
    del model
    gc.collect()
    torch.cuda.empty_cache()
    for stack in stacks.values():  # what is left to compile
        for rows, tokens in shapes if "steps" in args.parts else ():
            for _ in range(2):
                run(stack, rows, tokens)
    generating = {stack: model for stack, model in stacks.items() if "checkpointing" not in stack}
    for stack, model in list(generating.items()):
        model.eval()
        try:
            for graphs in (False, True) if stack == "qlora_fx" else ():  # a ring's graph is another
                model.cuda_graphs = graphs
                for rows in GENERATED_ROWS:
                    generate(model, rows, 2)
            if stack == "qlora_fx":
                model.cuda_graphs = False
            for rows in GENERATED_ROWS:
                generate(model, rows, 2)
        except Exception as error:
            del generating[stack]
            reports.append({"stack": stack, "generate": f"{type(error).__name__}: {error}"[:400]})
        model.train()
    say("ready")
    sys.stdin.readline()
    for report in reports:
        say(json.dumps(report))
    say(f"device: {torch.cuda.get_device_name()}, torch {torch.__version__}")
    mine = stacks.get("qlora_fx")
    if "steps" in args.parts:
        for rows, tokens in shapes:
            measure(run, name, stacks, held, rows, tokens, args.rounds)
        say(json.dumps(optimizers(stacks)))
    if "steps" in args.parts and args.host and mine is not None:
        by_python(args.host / f"{name}_step.txt", lambda: run(mine, 1, 512))
    for model in generating.values():
        model.eval()
    for rows in GENERATED_ROWS if "tokens" in args.parts else ():
        say(json.dumps(generation(generating, rows, min(args.rounds, 3))))
    if args.host and "qlora_fx" in generating:
        mine.cuda_graphs = True
        generate(mine, 1, NEW)
        by_python(args.host / f"{name}_tokens.txt", lambda: generate(mine, 1, NEW))


def say(text: str) -> None:
    print(text, flush=True)


def dense_model(name: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings = {**MODELS[name], "max_position_embeddings": 8192, "use_cache": False}
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        if name == "moe":
            model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
        else:
            model = LlamaForCausalLM(LlamaConfig(**settings))
    torch.set_default_dtype(before)
    return model


def makers(name: str, wanted: list[str]) -> dict[str, Callable[[Any], Any]]:
    made = {
        "reference": lambda model: reference(model, checkpointing=False),
        "reference, checkpointing": lambda model: reference(model, checkpointing=True),
        "qlora_fx": lambda model: qlora(model),
    }
    if name == "moe":
        wanted = ["qlora_fx"]
    return {stack: make for stack, make in made.items() if stack in wanted}


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")


def qlora(model: Any) -> Any:
    import qlora_fx

    return qlora_fx.transform(model, lora())


def reference(model: Any, *, checkpointing: bool) -> Any:
    """bitsandbytes' Linear4bit in the place of each linear, PEFT's LoRA on it: what the usual recipe loads."""
    import copy

    import bitsandbytes as bnb
    import torch
    from peft import get_peft_model

    linears = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    memo: dict[int, Any] = {}
    for module in linears.values():  # weights that are quantized are not copied before
        memo[id(module.weight)] = torch.nn.Parameter(torch.empty(0, device="cuda"), False)
    q = copy.deepcopy(model, memo)
    for path, module in linears.items():
        new = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        new.weight = bnb.nn.Params4bit(
            module.weight.data,
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            module=new,
        ).to("cuda")
        parent, _, leaf = path.rpartition(".")
        setattr(q.get_submodule(parent), leaf, new)
    for p in q.parameters():
        p.requires_grad_(False)
    if checkpointing:
        q.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        q.enable_input_require_grads()
    return get_peft_model(q, lora()).train()


def batch(rows: int, tokens: int, padded: bool) -> dict[str, Any]:
    import torch

    ids = torch.randint(5, 100000, (rows, tokens), device="cuda")
    lengths = torch.linspace(tokens, tokens // 2 if padded else tokens, rows, device="cuda").long()
    mask = (torch.arange(tokens, device="cuda") < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step_of(stack: Any, rows: int, tokens: int, padded: bool = False) -> Any:
    import torch

    stack.zero_grad(set_to_none=True)
    # As Trainer's bf16=True does it: PEFT keeps adapters in float32. Ours multiplies in bfloat16 by itself.
    mine = type(stack).__module__.startswith("qlora_fx")
    with contextlib.nullcontext() if mine else torch.autocast("cuda", torch.bfloat16):
        loss = stack(**batch(rows, tokens, padded)).loss
    loss.backward()
    return loss


def timed(step: Callable[[], Any]) -> float:
    """Milliseconds."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measure(
    run: Callable[[Any, int, int], Any],
    name: str,
    stacks: dict[str, Any],
    held: dict[str, float],
    rows: int,
    tokens: int,
    rounds: int,
) -> None:
    import torch

    products = bound(name, rows * tokens)
    for _ in range(2):
        timed(products)
    steps: dict[str, Callable[[], Any]] = {
        stack: (lambda model=model: run(model, rows, tokens)) for stack, model in stacks.items()
    }
    steps["bound"] = products
    times: dict[str, list[float]] = {stack: [] for stack in steps}
    if "qlora_fx" in stacks:
        mine = steps["qlora_fx"]
        with_graphs, pool = recorded(stacks["qlora_fx"], mine)
        steps[GRAPHED] = lambda: with_graphs(mine)
        times[GRAPHED] = []
    for step in steps.values():
        timed(step)
    for _ in range(rounds):
        for stack, step in steps.items():
            times[stack].append(timed(step))
    floor = statistics.median(times["bound"])
    del products, steps["bound"]
    torch.cuda.empty_cache()
    usual = min(
        (statistics.median(times[s]) for s in stacks if s.startswith("reference")), default=None
    )
    for stack, model in stacks.items():
        for other in stacks.values():
            other.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = steps[stack]()
        torch.cuda.synchronize()
        found = {
            "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
            "held_gb": held[stack],
            "loss": float(loss.detach()),
            "gradients": gradients(model),
        }
        told = speed(stack, rows, tokens, times[stack], floor, usual)
        say(json.dumps(told | found | profiled(steps[stack])))
    if GRAPHED in steps:
        model = stacks["qlora_fx"]
        loss = steps[GRAPHED]()
        found = {
            "recordings_gb": pool,
            "loss": float(loss.detach()),
            "gradients": gradients(model),
        }
        told = speed(GRAPHED, rows, tokens, times[GRAPHED], floor, usual)
        say(json.dumps(told | found | profiled(steps[GRAPHED])))
        del steps[GRAPHED]
        model.cuda_graphs = False
        torch.cuda.empty_cache()


def speed(
    stack: str, rows: int, tokens: int, times: list[float], floor: float, usual: float | None
) -> dict[str, Any]:
    median = statistics.median(times)
    return {
        "stack": stack,
        "rows": rows,
        "tokens": tokens,
        "median_ms": median,
        "min_ms": min(times),
        "max_ms": max(times),
        "tokens_per_s": rows * tokens / median * 1e3,
        "bound_ms": floor,
        "x_bound": median / floor,
        **({} if usual is None else {"x_reference": median / usual}),
    }


def gradients(model: Any) -> str:
    """Of what was just run."""
    trained = [p for p in model.parameters() if p.requires_grad]
    norms = [float(p.grad.norm()) for p in trained if p.grad is not None]
    return f"{sum(n > 0 for n in norms)} of {len(trained)} not zero"


GRAPHED = "qlora_fx, cuda_graphs"


def recorded(model: Any, warm: Callable[[], Any]) -> tuple[Callable[..., Any], float]:
    """What runs a call with the launches that ``warm`` makes recorded, and the GB that the recordings take.

    Other calls are launched one by one.
    """
    import torch

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model.cuda_graphs = True
    for _ in range(3):
        warm()
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    taken = (torch.cuda.memory_reserved() - before) / 1e9
    kept = [(program, program.graphed) for program in model.programs]
    buffers = model.programs.buffers

    def set_all(on: bool) -> None:
        model.programs.buffers = buffers if on else None
        for program, graphed in kept:
            program.graphed = graphed if on else None

    def with_graphs(work: Callable[[], Any]) -> Any:
        set_all(True)
        result = work()
        set_all(False)
        return result

    set_all(False)
    return with_graphs, taken


def bound(name: str, tokens: int) -> Callable[[], None]:
    """The products of one step on buffers made beforehand."""
    import torch

    c = MODELS[name]
    h, d = c["hidden_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * d, c["num_key_value_heads"] * d
    layer = [(q, h), (kv, h), (kv, h), (h, q)]
    if name != "moe":
        m = c["intermediate_size"]
        layer += [(m, h), (m, h), (h, m)]
    linears = layer * c["num_hidden_layers"]
    made: dict[tuple[int, ...], Any] = {}

    def buffer(*shape: int) -> Any:
        if shape not in made:
            made[shape] = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        return made[shape]

    def products() -> None:
        for out, inn in linears:
            x, y, w = buffer(tokens, inn), buffer(tokens, out), buffer(out, inn)
            a, b, z = buffer(RANK, inn), buffer(out, RANK), buffer(tokens, RANK)
            torch.mm(x, w.t())
            torch.mm(y, w)
            torch.mm(x, a.t())
            torch.mm(z, b.t())
            torch.mm(y.t(), z)
            torch.mm(y, b)
            torch.mm(z.t(), x)
            torch.mm(z, a)
        if name == "moe":
            m, e = c["moe_intermediate_size"], c["num_experts"]
            n = tokens * c["num_experts_per_tok"]
            ends = torch.arange(1, e + 1, device="cuda", dtype=torch.int32) * (n // e)
            for out, inn in ((2 * m, h), (h, m)) * c["num_hidden_layers"]:
                x, y, w = buffer(n, inn), buffer(n, out), buffer(e, out, inn)
                torch._grouped_mm(x, w.transpose(1, 2), offs=ends)
                torch._grouped_mm(y, w, offs=ends)
        for start in range(0, tokens, 1024):
            n = min(1024, tokens - start)
            x, y, w = buffer(n, h), buffer(n, c["vocab_size"]), buffer(c["vocab_size"], h)
            torch.mm(x, w.t())
            torch.mm(y, w)

    return products


def profiled(step: Callable[[], Any]) -> dict[str, Any]:
    """Launches, waits and the kernels that take longest, of one step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            step()
            torch.cuda.synchronize()
        events = found.events()
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        totals: dict[str, list[float]] = {}
        for e in kernels:
            entry = totals.setdefault(e.name, [0, 0.0])
            entry[0] += 1
            entry[1] += e.device_time_total / 1e3
        said = ("LaunchKernel", "GraphLaunch")
        host = sum(any(word in e.name for word in said) for e in events)
        waits = sum(e.name in ("cudaStreamSynchronize", "cudaEventSynchronize") for e in events)
        top = sorted(totals.items(), key=lambda item: -item[1][1])[:14]
        return {
            "launches": len(kernels),
            "host_launches": host,
            "waits": waits,
            "busy_ms": round(sum(t for _, t in totals.values()), 2),
            "kernels": [[name[:70], count, round(ms, 3)] for name, (count, ms) in top],
        }
    except Exception as error:
        return {"profile": f"{type(error).__name__}: {error}"[:200]}


def is_paged(state: Any, optimizer: Any) -> bool:
    """Also where it is a part of a run's: adapters are updated by the million."""
    return any(
        whole.data_ptr() <= state.data_ptr() < whole.data_ptr() + whole.nbytes
        for whole in optimizer.page_mng.paged_tensors
    )


def sizes(shapes: Sequence[str]) -> list[tuple[int, int]]:
    """Rows and tokens."""
    pairs = (shape.split("x") for shape in shapes)
    return [(int(rows), int(tokens)) for rows, tokens in pairs]


def planned(name: str, shapes: Sequence[str]) -> None:
    """What qlora_fx.plan says of the same steps, from the config alone."""
    import qlora_fx
    from transformers import LlamaConfig, Qwen3MoeConfig

    kind = Qwen3MoeConfig if name == "moe" else LlamaConfig
    settings = {**MODELS[name], "max_position_embeddings": 8192, "use_cache": False}
    for rows, tokens in sizes(shapes):
        plan = qlora_fx.plan(
            kind(**settings), lora(), batch_size=rows, sequence_length=tokens,
            optimizer="PagedAdamW8bit",
        )  # fmt: skip
        gb = (plan.peak - plan.optimizer) / 1e9  # paged state is not in max_memory_allocated
        found = {"plan": name, "rows": rows, "tokens": tokens, "peak_and_held_gb": round(gb, 3)}
        say(json.dumps(found))


def optimizers(stacks: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of an update of all adapters, by stack."""
    import bitsandbytes as bnb

    found: dict[str, Any] = {"optimizer": "PagedAdamW8bit"}
    for stack, model in stacks.items():
        try:
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = bnb.optim.PagedAdamW8bit(trained, lr=1e-5)
            step_of(model, 1, 512)
            for _ in range(3):
                timed(optimizer.step)
            found[stack] = round(statistics.median(timed(optimizer.step) for _ in range(5)), 2)
            states = optimizer.state.values()
            found[f"{stack}: paged"] = sum(is_paged(s["state1"], optimizer) for s in states)
        except Exception as error:
            found[stack] = f"{type(error).__name__}: {error}"[:200]
    return found


def generate(model: Any, rows: int, new: int, **options: Any) -> Any:
    """``new`` tokens for each row of a prompt, with a cache."""
    import torch

    torch.manual_seed(0)
    made = batch(rows, PROMPT, False)
    del made["labels"]
    settings = {"use_cache": True, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["return_dict_in_generate"] = True
    return model.generate(**made, max_new_tokens=new, **settings, **options)


def generation(stacks: dict[str, Any], rows: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a prompt's first token and of each further one, with a cache, by stack; launches of that one."""
    found: dict[str, Any] = {"generated": f"{rows} x {PROMPT}"}
    works: dict[str, Callable[[int], Any]] = {
        stack: (lambda n, model=model: generate(model, rows, n)) for stack, model in stacks.items()
    }
    if "qlora_fx" in works:
        mine = works["qlora_fx"]
        with_graphs, taken = recorded(stacks["qlora_fx"], lambda: mine(8))
        works[GRAPHED] = lambda n: with_graphs(lambda: mine(n))
        found["recordings_gb"] = round(taken, 2)
        one, other = (
            work(lambda: generate(stacks["qlora_fx"], rows, 4, output_logits=True)).logits
            for work in (lambda f: f(), with_graphs)
        )
        # Of the first token that was read from a cache; with random weights logits are close, and tokens soon others.
        found["logits_off"] = float((one[1] - other[1]).norm() / one[1].norm())
    times: dict[str, list[tuple[float, float]]] = {stack: [] for stack in works}
    for _ in range(rounds):
        for stack, work in works.items():
            first, whole = (timed(lambda work=work, n=n: work(n)) for n in (1, NEW + 1))
            times[stack].append((first, (whole - first) / NEW))
    for stack, taken in times.items():
        found[stack] = [round(statistics.median(t), 2) for t in zip(*taken, strict=True)]
        one, two = (profiled(lambda work=works[stack], n=n: work(n)) for n in (2, 3))
        for key in ("launches", "host_launches", "waits", "busy_ms"):
            if key in one and key in two:
                found[f"{stack}: {key}"] = round(two[key] - one[key], 2)
    if GRAPHED in works:
        stacks["qlora_fx"].cuda_graphs = False
    return found


def by_python(place: Path, step: Callable[[], Any]) -> None:
    """Where Python spends three steps."""
    import cProfile
    import io
    import pstats

    import torch

    found = cProfile.Profile()
    torch.cuda.synchronize()
    found.enable()
    for _ in range(3):
        step()
    found.disable()
    told = io.StringIO()
    told_by = pstats.Stats(found, stream=told)
    told_by.sort_stats("tottime").print_stats(60)
    told_by.sort_stats("cumulative").print_stats(60)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(told.getvalue())


if __name__ == "__main__":
    main()
