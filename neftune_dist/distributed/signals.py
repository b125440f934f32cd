"""Requests to stop: signals to a rank, and the exception by which it leaves long work at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The process was asked to stop while nothing needed saving.

    It is no `Exception`, so that the code it interrupts does not handle it as a failure.
    """


class StopSignal:
    """SIGTERM, SIGUSR1 or Ctrl-C: finish the step, save, exit 75. Calling it says whether one came.

    Made before torch is imported: a signal meanwhile counts, but Ctrl-C ends the process at once
    until `hear_ctrl_c`.

    Attributes:
        since: monotonic time of the first signal, or None.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self._at_once = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def hear_ctrl_c(self) -> None:
        """From here on the first Ctrl-C, too, asks to stop."""
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.since = self.since or time.monotonic()
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._at_once:
            self._at_once = False
            raise Stopped

    def __call__(self) -> bool:
        return self.since is not None

    def has_waited(self, began: float, seconds: float) -> bool:
        """Whether a wait that began then has gone on for so long after a signal."""
        return self.since is not None and time.monotonic() - max(self.since, began) > seconds

    def ignore(self) -> None:
        """From here on signals change nothing: Python lets them end the process as it exits."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, which does long work on the host and has nothing to save, a signal
        raises `Stopped` wherever it finds the main thread."""
        self._at_once = True
        try:
            if self():
                raise Stopped
            yield
        finally:
            self._at_once = False
