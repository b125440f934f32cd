"""Limits on the time and the memory that reading untrusted input may take.

Chat templates, pickles and nested text are small programs: a few bytes of them can use up any time
and any memory. A block under `limited` that does so ends with an exception.
"""

from __future__ import annotations

import math
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

_GIB = 2**30
# The exception is raised again until the block ends, because libraries catch it.
_REPEAT_SECONDS = 0.1
# Further time for a call into C to return, after which its process is killed.
_GRACE_SECONDS = 5.0

_running = False  # whether a block of this process is limited


@contextmanager
def limited(
    seconds: float, gib: float, error: type[Exception] | None = None, what: str = ""
) -> Iterator[None]:
    """Limit the block's processor time, and its memory beyond what the process has now.

    The limit is on processor time, because on a busy machine honest work takes longer by the clock.
    It holds in the main thread alone, where Python runs signal handlers. A call into C that never
    returns to Python ends with its process, after twice the time. Limits do not nest: the outer
    block's hold.

    Args:
        seconds: processor time.
        gib: memory; infinity for no limit.
        error: raised in place of those below, with a sentence that says how much `what` took.

    Raises:
        TimeoutError: the time is over.
        MemoryError: the memory is used up; libraries may raise other errors for it.
    """
    try:
        with nullcontext() if _running else _limits(seconds, gib):
            yield
    except (TimeoutError, MemoryError) as found:  # Arrow's memory error is a MemoryError
        if error is None:
            raise
        limits = f"{seconds:g} s or {gib:g} GiB of memory"
        raise error(f"{what} takes more than {limits}.") from found


@contextmanager
def _limits(seconds: float, gib: float) -> Iterator[None]:
    global _running
    timed = threading.current_thread() is threading.main_thread()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceilings = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    if math.isfinite(gib):
        ceilings.append(_address_space() + int(gib * _GIB))
    try:
        _running = True
        resource.setrlimit(resource.RLIMIT_AS, (min(ceilings, default=soft), hard))
        if timed:
            _start_clocks(seconds)
        yield
    finally:
        _running = False  # from here on the handler does nothing
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _start_clocks(seconds: float) -> None:
    if signal.getsignal(signal.SIGVTALRM) is not _out_of_time:
        signal.signal(signal.SIGVTALRM, _out_of_time)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _REPEAT_SECONDS)
    if signal.getsignal(signal.SIGPROF) is signal.SIG_DFL:  # no profiler uses it
        signal.setitimer(signal.ITIMER_PROF, 2 * seconds + _GRACE_SECONDS)


def _out_of_time(number: int, frame: FrameType | None) -> None:
    if _running:
        raise TimeoutError("it takes too long")


def _address_space() -> int:
    """Bytes of virtual memory that the process has now."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
