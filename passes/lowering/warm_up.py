"""What a compiler for CPUs can do before there is anything to compile."""

from __future__ import annotations

import threading

from torch._inductor.cpu_vec_isa import pick_vec_isa

from ...runtime import attention_kernels


class WarmUp:
    """Lets Inductor find out what this CPU can do, which takes 10 s of test compilations, while a model is captured.

    Attention kernels, which are the same for every model, are compiled meanwhile too.

    The work is in compiler processes; Python's lock is free meanwhile.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None

    def start(self) -> None:
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, daemon=True)
            self.thread.start()

    def run(self) -> None:
        pick_vec_isa()
        attention_kernels.prepare("cpu")


warm_up = WarmUp()
