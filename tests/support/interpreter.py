"""A process in which Triton interprets its kernels, on the CPU.

Triton chooses between compiling and interpreting once, when it is imported; so no test but those
that ask for it meets the interpreter. Tensors go there and back in shared memory, as torch sends
them, so what a kernel writes there is seen here.
"""

from __future__ import annotations

import multiprocessing
import os
import unittest.mock
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

DEADLINE_SECONDS = 120


@contextmanager
def interpreting_process() -> Iterator[ProcessPoolExecutor]:
    """One worker, whose functions come from modules that it can import."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with unittest.mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(os.getpid).result(DEADLINE_SECONDS)  # starts the process
        yield pool
