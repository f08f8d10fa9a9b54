"""What only a GPU can show: ``make gpu``. Where there is none, each test here is skipped, with a count."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write what came out of each test to ``QLORA_FX_GPU_LOG`` as it comes: a machine with a GPU may be lent for minutes."""
    place = os.environ.get("QLORA_FX_GPU_LOG")
    if place is None or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if report.when == "call" or report.outcome != "passed":
        found = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 1),
        }
        if report.failed:
            found["error"] = report.longreprtext[-1500:]
        with open(place, "a") as file:
            file.write(json.dumps(found) + "\n")


@pytest.fixture(autouse=True)
def memory_is_given_back() -> Iterator[None]:
    """Several workers share one GPU."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
