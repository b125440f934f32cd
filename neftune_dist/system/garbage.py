"""Python's collector of cyclic garbage, where it costs seconds and finds nothing.

torch and transformers make 400,000 objects when they are imported, which stay to the end. To look
through all of them takes a fifth of a second: several times during the imports, at some step of
some rank, for which the others wait, and again and again when the interpreter ends.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_USUAL, _STARTING = gc.get_threshold(), (50_000, 20, 100)


@contextmanager
def uncollected() -> Iterator[None]:
    """Run without the collector."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def collect_rarely() -> None:
    """Collect rarely from now on: the process starts, and imports what it needs."""
    gc.set_threshold(*_STARTING)


def keep_imports() -> None:
    """Collect as usual from now on, but never what a process that has started holds by now."""
    if gc.get_threshold() == _STARTING:
        gc.freeze()
        gc.set_threshold(*_USUAL)


class QuickEnd:
    """An end of the process as usual, but for Python's own: without a search for garbage.

    Threads are waited for, and what others have registered to be called at the end is called.
    """

    def __init__(self) -> None:
        """Prepare the end. Call it before the imports: handlers registered earlier are skipped."""
        self.code: int | None = None
        atexit.register(self._leave)  # called last, as it is registered first

    def _leave(self) -> None:
        if self.code is None:  # by an exception, which Python reports
            return
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # The C library's, which holds the interpreter's lock: profilers write what they have seen
        # then, and no other thread goes on.
        ctypes.PyDLL(None).exit(self.code)
