"""How the suite runs. PyTorch and the package are imported by workers alone: xdist's own process needs neither."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from qlora_fx.config import Config

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores: before PyTorch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

LONGEST = (
    "test_new_process.py",
    "test_default_path.py",
    "test_model.py",
    "test_trainers.py",
    "test_training.py",
    "test_planning.py",
    "test_experts.py",
    "test_parity.py",
    "test_docs.py",
    "test_families.py",
    "test_cli.py",
)
"""Files that take longest, first: workers take whole files, and one should not work alone at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part", metavar="K/N", help="the Kth of N parts: every Nth test from the Kth on"
    )


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))
    if part := config.getoption("part"):
        try:
            k, n = (int(number) for number in part.split("/"))
        except ValueError:
            k = n = 0
        if not 1 <= k <= n:
            raise pytest.UsageError(f"--part {part}; accepted: K/N with K from 1 to N")
        left = [item for i, item in enumerate(items) if i % n != k - 1]
        config.hook.pytest_deselected(items=left)
        items[:] = items[k - 1 :: n]


@pytest.fixture
def config() -> Config:
    """NF4 with double quantization, r=2 on everything but ``head``."""
    import torch
    from qlora_fx.config import Config, Quantization, default_lora

    lora = default_lora()
    lora.r, lora.lora_alpha = 2, 4
    return Config(lora, Quantization(), torch.float32, frozenset({"head.weight"}))


@pytest.fixture(autouse=True, scope="session")
def auto_is_float32() -> Iterator[None]:
    """``compute_dtype="auto"`` measures the machine; what a test expects must not depend on it."""
    import torch
    from qlora_fx.compiler import request
    from qlora_fx.runtime.fastest_dtype import ComputeDtype

    fixed = ComputeDtype(torch.float32, "fixed for the tests")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "fastest", lambda device: fixed)
        yield


@pytest.fixture(autouse=True, scope="session")
def fewer_collections() -> None:
    """Traces make millions of small objects that live on: looking through them takes a seventh of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)


@pytest.fixture(autouse=True, scope="module")
def what_lives_on() -> None:
    """What is kept for other tests is looked through no more; trainers collect whenever they begin and end."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_capture_and_one_compilation_of_each() -> Iterator[None]:
    import sharing

    with sharing.shared():
        yield
