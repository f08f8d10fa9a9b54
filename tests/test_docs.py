"""What the README and the examples show is what the program prints today."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_snippet_runs(tmp_path: Path) -> None:
    from small_models import batch, tiny_llama

    tiny_llama(1).save_pretrained(tmp_path / "model")
    text = (ROOT / "README.md").read_text()
    snippet = text.split("```python\n")[1].split("```")[0]
    cwd = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(snippet, {"path": tmp_path / "model", "batch": batch()})
    finally:
        os.chdir(cwd)
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.slow
def test_the_example_of_experts_passes_its_own_check() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "check_experts.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "MixtralForCausalLM: passed" in done.stdout
    assert "experts.gate_up_proj  grouped_mm  4x192x64" in done.stdout
    assert "router stays dense" in done.stdout
    assert done.stderr == "", "no stray warnings"


@pytest.mark.slow
def test_the_example_of_loading_saves_and_merges(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "examples" / "load_quantized.py"),
            "--backend",
            "eager",
            "--out",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "14 of 15 linears quantized, 14 adapted" in done.stdout
    assert "merged, dequantized; relative error beside what was trained" in done.stdout
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"4bit", "adapter", "merged", "model"}
