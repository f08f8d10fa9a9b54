"""What a compiler for CPUs can do before there is anything to compile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

from torch._inductor.cpu_vec_isa import pick_vec_isa

from ...runtime import attention_kernels
from .one_library import compile_headers


class WarmUp:
    """Lets Inductor find out what this CPU can do, by test compilations of 5 to 10 s, while a model is captured.

    The headers of its kernels and attention kernels, which are the same for every model, are compiled meanwhile too.

    The work is in compiler processes; Python's lock is free meanwhile.
    """

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        if not self.threads:
            self.threads = [threading.Thread(target=quietly, args=[pick_vec_isa], daemon=True)]
            for work in (compile_headers, lambda: attention_kernels.prepare("cpu")):
                self.threads.append(threading.Thread(target=self.then, args=[work], daemon=True))
            for thread in self.threads:
                thread.start()

    def then(self, work: Callable[[], object]) -> None:
        self.wait()
        quietly(work)

    def wait(self) -> None:
        """Until it is known what the CPU can do; who needs the rest waits for the files' locks."""
        if self.threads:
            self.threads[0].join()


def quietly(work: Callable[[], object]) -> None:
    """What fails, for want of a compiler, fails again where it is needed, and is told there."""
    with contextlib.suppress(Exception):
        work()


warm_up = WarmUp()
