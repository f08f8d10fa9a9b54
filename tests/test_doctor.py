"""``python -m qlora_fx.doctor``: what it says of a machine, and that it notices what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qlora_fx.cli import doctor
from qlora_fx.cli.main import main


def said(capsys: Any, *words: str, status: int | None = None) -> str:
    capsys.readouterr()
    if status is None:
        main(["doctor", *words])
    else:
        with pytest.raises(SystemExit) as stopped:
            main(["doctor", *words])
        assert stopped.value.code == status
    return str(capsys.readouterr().out)


def test_it_reports_versions_devices_and_libraries(capsys: Any, tmp_path: Path) -> None:
    text = said(capsys, "--quick", "--out", str(tmp_path / "report.txt"))
    for words in (
        f"torch {torch.__version__.split('+')[0]}",
        "cpu multiplies in float32",
        "bitsandbytes answers with libbitsandbytes",
        "causal attention on cpu: ",
        "compiler cache: ",
        "nothing failed",
    ):
        assert words in text
    assert (tmp_path / "report.txt").read_text() == text
    if not torch.cuda.is_available():
        assert "no GPU was seen" in text


def test_what_is_wrong_fails(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(passed=False, worst_output=0.5, worst_gradient=0.25)

    def broken(*args: Any) -> Any:
        raise RuntimeError("no\n  kernel")

    def version(name: str) -> str:
        if name == "peft":
            raise doctor.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(doctor, "check", wrong)
    monkeypatch.setattr(doctor, "transform", broken)
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    text = said(capsys, status=1)
    for words in (
        "FAILED peft is not installed",
        "note   transformers 1.0; tested with ",
        "FAILED no C++ compiler",
        "FAILED a compiled step in float32 beside float64: worst output 5.0e-01",
        "FAILED RuntimeError: no kernel",
        "4 failed",
    ):
        assert words in text


@pytest.mark.slow
def test_the_whole_of_it_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "qlora_fx.doctor"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a compiled step in float32 beside float64: worst output" in done.stdout
    assert "nothing failed" in done.stdout
    assert not done.stderr
