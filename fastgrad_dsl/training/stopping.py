"""Stopping a training run from outside: the first signal lets it save what it has, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HEARD = b"\n%s: stopping when this step has ended and is saved; a second one stops at once\n"


class StopAsked(Exception):
    """A long calculation within a run is given up, because the run is to stop."""


class Stopped(Exception):
    """A run has stopped where it was asked to, with `step` steps in its checkpoint."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass
class Stop:
    """Whether a run is to stop: the number of the signal that says so, None while there is none."""

    signal: int | None = None

    def check(self) -> None:
        """Raise StopAsked where it is."""
        if self.signal is not None:
            raise StopAsked


@contextmanager
def stop_on_signals(*, among_others: bool = False) -> Iterator[Stop]:
    """A Stop that the signals of SIGNALS set; each does what it did before once one of them has come.

    Outside of the main thread, which alone gets signals, it is never set. `among_others`: nothing is said, and further
    signals change nothing: a terminal and the agent both send one, and the agent ends what does not stop.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def heard(number: int, frame: FrameType | None) -> None:
        stop.signal = number
        if among_others:
            return
        put_back()
        os.write(
            2, _HEARD % signal.Signals(number).name.encode()
        )  # a print might be interrupted within itself

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, heard)
    try:
        yield stop
    finally:
        put_back()
