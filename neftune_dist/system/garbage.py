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
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_USUAL, _STARTING = gc.get_threshold(), (50_000, 20, 100)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Run without the collector."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def collect_rarely() -> None:
    """Collect rarely until `keep_imports`: the process imports what it needs."""
    gc.set_threshold(*_STARTING)


def keep_imports() -> None:
    """Collect as usual again, but never look at the objects that exist now. Verbs that hold tensors
    call it when their modules are imported; without `collect_rarely` before it, it does nothing."""
    if gc.get_threshold() == _STARTING:
        gc.freeze()
        gc.set_threshold(*_USUAL)


_at_once = False


def end_at_once() -> None:
    """Let `QuickEnd` end the process without any teardown, which a GPU that is waited for in vain
    would hold up for ever."""
    global _at_once
    _at_once = True


class QuickEnd:
    """Ends the process without the interpreter's own teardown, which searches for garbage.

    As usual, threads are waited for, and functions registered with `atexit` are called.

    Attributes:
        code: the exit code; None: an exception ends the process, and the interpreter reports it.
    """

    def __init__(self) -> None:
        """Register the end. Functions that were registered earlier would be skipped."""
        self.code: int | None = None
        atexit.register(self._leave)  # called last, as it is registered first

    def _leave(self) -> None:
        if self.code is None and not _at_once:
            return
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        if _at_once:
            os._exit(1 if self.code is None else self.code)
        # C's exit calls the handlers of C libraries, by which profilers write their files. PyDLL
        # keeps the interpreter's lock meanwhile, so that no Python thread runs on.
        ctypes.PyDLL(None).exit(self.code)
