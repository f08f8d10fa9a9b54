"""What only a process of its own shows: what importing brings, what an example prints, what the environment changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDED_LATER = (
    "gguf",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.exporters.exporter_dynamo",
    "matplotlib",
    "datasets",
    "pandas",
)
"""Large, and used by few calls. accelerate is not among them: PEFT imports it."""
PROGRAM = f"""
import runpy, sys, bitsandbytes, peft, torch, transformers.modeling_utils
theirs = set(sys.modules)
import qlora_fx
assert callable(qlora_fx.transform) and callable(qlora_fx.explain), "the functions, not the modules"
print(*(set(sys.modules) - theirs))
runpy.run_path({str(ROOT / "examples" / "inspect_graph.py")!r}, run_name="__main__")
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """One for all: most of its time goes to importing."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TORCH_LOGS": "+qlora_fx"},
    )


def test_importing_brings_no_library_that_only_few_calls_need(
    done: subprocess.CompletedProcess[str],
) -> None:
    brought = done.stdout.partition("\n")[0].split()
    assert "qlora_fx.public" in brought
    assert not set(NEEDED_LATER).intersection(brought)


def test_the_readme_shows_what_inspect_graph_prints(
    done: subprocess.CompletedProcess[str],
) -> None:
    assert done.returncode == 0, done.stderr
    printed = done.stdout.partition("\n")[2]
    shown = printed.split("\n\nLlamaForCausalLM as qlora_fx runs it")[0]
    assert shown.startswith("# as captured")
    assert shown in (ROOT / "README.md").read_text()


def test_torch_logs_reaches_our_logger(done: subprocess.CompletedProcess[str]) -> None:
    """Each stage's diff is on stderr. The package is imported by PyTorch then, in the middle of bitsandbytes' import."""
    assert "+    %model_layers_0_mlp_up_proj_lora_a: f32[B, S, 8]" in done.stderr
