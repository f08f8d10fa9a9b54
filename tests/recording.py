"""A stand-in for the recorder of CUDA graphs, which does again on a CPU what it was shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from qlora_fx.compiler.programs import read_at_once
from qlora_fx.passes.lowering.recorded import recorded
from qlora_fx.runtime.cuda_graphs import Recorder
from torch import Tensor


class StandIn(Recorder):
    """Records nothing: it does the work again, into the results of the first time."""

    def __init__(self, happened: list[str]) -> None:
        self.happened = happened
        self.device = torch.device("cpu")
        self.replays = 0

    def warm_up(self, work: Callable[[], list[Tensor]]) -> None:
        self.happened.append("warm up")
        work()

    def record(self, work: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        self.happened.append("record")
        results = work()

        def replay() -> None:
            self.happened.append(f"replay {work.__name__}")
            with torch.no_grad():
                for place, value in zip(results, work(), strict=True):
                    place.copy_(value)

        return results, replay


def record(qmodel: Any, happened: list[str]) -> None:
    for program in qmodel.programs:
        program.graphed = recorded(
            program.run, qmodel.device, read_at_once(program), lambda: StandIn(happened)
        )
