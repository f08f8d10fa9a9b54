"""``qlora-fx doctor``: what is installed, what answers, and whether a training step is right on this machine.

It needs no network and no model, prints what it finds as it goes, and writes it to a file for an issue with ``--out``.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from ..runtime.attention_kernels import Inputs, kernel_for
from ..runtime.attention_kernels.kernel import Mask
from ..runtime.fastest_dtype import fastest
from ..tested_versions import TESTED, minor
from ..testing import check
from ..transform import transform
from .main import COMMANDS
from .parser import Parser
from .settings import DoctorSettings

OK, NOTE, FAILED = "ok", "note", "FAILED"
LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "trl", "triton")


class Finding(NamedTuple):
    """One line of the report.

    Attributes:
        verdict: ``OK``, ``NOTE`` for what to know, or ``FAILED``.
        text: what was found.
    """

    verdict: str
    text: str

    def __str__(self) -> str:
        return f"  {self.verdict:6} {self.text}"


def run(command: str, args: list[str]) -> None:
    """Print the report; exits with 1 where something failed."""
    parser = Parser(
        command,
        (DoctorSettings,),
        positional={".yaml": "--config", ".yml": "--config"},
        text=COMMANDS[command][1],
    )
    (settings,) = parser.parse(args)
    sections: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", versions),
        ("devices", devices),
        ("libraries and caches", libraries),
    ]
    if not settings.quick:
        sections += [
            (f"training on {n}", partial(training, torch.device(n))) for n in every_device()
        ]
    lines: list[str] = []
    failed = 0
    for title, section in sections:
        for line in (f"{title}:", *section()):
            print(line, flush=True)
            lines.append(str(line))
            failed += isinstance(line, Finding) and line.verdict == FAILED
    last = f"{failed} failed" if failed else "nothing failed"
    if not torch.cuda.is_available():
        last += "; no GPU was seen, so nothing is said of one"
    print(last)
    if settings.out:
        Path(settings.out).write_text("\n".join([*lines, last]) + "\n")
    if failed:
        raise SystemExit(1)


def every_device() -> list[str]:
    """The CPU first."""
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]


def versions() -> Iterator[Finding]:
    yield Finding(OK, f"Python {platform.python_version()}, {platform.platform()}")
    for name in LIBRARIES:
        try:
            found = version(name)
        except PackageNotFoundError:
            if name not in ("trl", "triton"):
                yield Finding(FAILED, f"{name} is not installed")
            continue
        oldest, newest = TESTED.get(name, ("0", "999999"))
        if minor(oldest) <= minor(found) <= minor(newest):
            yield Finding(OK, f"{name} {found}")
        else:
            yield Finding(NOTE, f"{name} {found}; tested with {oldest} to {newest}")


def devices() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        OK,
        f"CPU: {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}, "
        f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
    )
    for name in every_device()[1:]:
        free, total = torch.cuda.mem_get_info(name)
        major, less = torch.cuda.get_device_capability(name)
        yield Finding(
            OK,
            f"{name}: {torch.cuda.get_device_name(name)}, compute capability {major}.{less}, "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        )
    for name in every_device():
        choice = fastest(name)
        dtype = str(choice.dtype).removeprefix("torch.")
        yield Finding(OK, f"{name} multiplies in {dtype} ({choice.reason})")


def libraries() -> Iterator[Finding]:
    yield bitsandbytes()
    for name in every_device():
        q = torch.zeros(1, 2, 64, 64, device=name, dtype=fastest(name).dtype)
        kernel = kernel_for(Inputs(q, q, q, Mask.of(None, None), 0.125)).name
        slow = name == "cpu" and kernel == "pytorch"
        why = ": no C++ compiler, or a CPU without the instructions" if slow else ""
        yield Finding(NOTE if slow else OK, f"causal attention on {name}: {kernel}{why}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        yield Finding(FAILED, "no C++ compiler: Inductor cannot compile for a CPU; install g++")
    else:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        yield Finding(OK, f"C++ compiler: {said.splitlines()[0] if said else compiler}")
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    place = Path(cache_dir())
    held = sum(f.stat().st_size for f in place.rglob("*") if f.is_file())
    free = shutil.disk_usage(place).free
    text = f"compiler cache: {held / 1e9:.2f} GB, {free / 1e9:.0f} GB free on its disk"
    yield Finding(OK if free > 1e9 else NOTE, text)


def bitsandbytes() -> Finding:
    from bitsandbytes.cextension import lib

    name = Path(str(getattr(getattr(lib, "_lib", None), "_name", ""))).name
    cuda = bool(getattr(lib, "compiled_with_cuda", False))
    if not name:
        return Finding(FAILED, "bitsandbytes has no library for this machine")
    if torch.cuda.is_available() and not cuda:
        return Finding(FAILED, f"bitsandbytes answers with {name}, which has no CUDA")
    return Finding(OK, f"bitsandbytes answers with {name}")


def training(device: torch.device) -> Iterator[Finding]:
    """A compiled step beside float64, and whether the loss falls."""
    model = small().to(device)
    ids = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    lora = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    began = time.perf_counter()
    try:
        report = check(model, batch, LoraConfig(**lora), quiet=True)
        seconds = time.perf_counter() - began
        worst = (
            f"worst output {report.worst_output:.1e}, worst gradient {report.worst_gradient:.1e}"
        )
        yield Finding(
            OK if report.passed else FAILED,
            f"a compiled step in float32 beside float64: {worst} ({seconds:.0f} s)",
        )
        qmodel = transform(model, LoraConfig(**lora))
        first, last = losses(qmodel, batch)
        dtype = str(qmodel.compute_dtype).removeprefix("torch.")
        yield Finding(
            OK if last < first else FAILED,
            f"ten steps in {dtype} with PagedAdamW8bit: loss {first:.2f} -> {last:.2f}",
        )
    except Exception as error:
        text = " ".join(str(error).split())[:500]
        yield Finding(FAILED, f"{type(error).__name__}: {text}")


def small() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def losses(qmodel: Any, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Before and after ten steps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Paged")  # what is not paged on a CPU is no finding
        optimizer = qmodel.paged_optimizer(1e-2, optimizer="PagedAdamW8bit")
    found = []
    for _ in range(10):
        loss = qmodel(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found[0], found[-1]
