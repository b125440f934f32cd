"""Processes that this one has started, and that end with it, however it ends (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

import psutil

_LIBC = ctypes.CDLL(None)  # loaded here: not between a fork and the program that follows it
_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of sys/prctl.h


def ended_with_parent() -> Callable[[], None]:
    """A `preexec_fn`: the process that is started gets SIGTERM, at which it saves and stops, when
    the thread that starts it has ended."""
    parent = os.getpid()

    return lambda: end_with_parent(parent)


def end_with_parent(parent: int) -> None:
    """Have the system send this process SIGTERM when its parent has died. The signal ends it until
    it sets its own handler, also where the parent ignores it.

    Args:
        parent: its process number. Where it has died already, the signal is sent at once.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _LIBC.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def descendants() -> list[int]:
    """Process numbers of this process's children, their children and so on."""
    return [process.pid for process in psutil.Process().children(recursive=True)]


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies."""
    _LIBC.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
