"""SIGTERM and Ctrl-C: the step that runs is finished and saved; a second one acts at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Stop:
    """Whether a signal came.

    Attributes:
        signal: its number; 0 if none came.
    """

    signal: int = 0

    def leave(self) -> None:
        """Go on as the signal would have: KeyboardInterrupt, or exit with the status that shells give it."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal:
            raise SystemExit(128 + self.signal)


@contextlib.contextmanager
def noticed() -> Iterator[Stop]:
    """Take SIGTERM and SIGINT for a wish, once. Outside of the main thread, which alone gets signals, nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def notice(number: int, frame: object) -> None:
        stop.signal = number
        restore()
        print(
            f"\n{signal.Signals(number).name}: stopping after this step (again: at once)",
            flush=True,
        )

    for number in before:
        signal.signal(number, notice)
    try:
        yield stop
    finally:
        restore()
