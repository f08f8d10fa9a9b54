"""The bound on memory while loading, and the time, on 3.6 GB of weights: what benchmarks/loading.py measures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROW = re.compile(
    r"\| (.+?) \| ([\d.]+) \| [\d.]* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|"
)


@pytest.mark.slow
def test_loading_stays_below_what_is_held_and_one_tensor_and_is_no_slower_than_the_reference() -> (
    None
):
    command = [sys.executable, str(ROOT / "benchmarks" / "loading.py"), "--rounds", "1"]
    done = subprocess.run(
        [*command, "--stacks", "ours", "reference"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    size = re.match(r"([\d.]+) GB in (\d+) files", done.stdout)
    assert size is not None
    assert float(size[1]) >= 3
    assert int(size[2]) > 1
    ours, reference = ((float(row[1]), float(row[5])) for row in ROW.findall(done.stdout))
    assert ours[1] <= 1.0 < reference[1], "peak / (held + largest tensor + 10 %)"
    assert ours[0] <= reference[0], "seconds"
