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
from typing import Any

DEADLINE_SECONDS = 120


@contextmanager
def interpreting_process() -> Iterator[ProcessPoolExecutor]:
    """One worker, whose functions come from modules that it can import."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=take_one_element_arrays) as pool:
        with unittest.mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            pool.submit(os.getpid).result(DEADLINE_SECONDS)  # starts the process
        yield pool


def take_one_element_arrays() -> None:
    """Let the interpreter of Triton before 3.7 count loops under numpy >= 2.4.

    Its scalars are arrays of shape (1,), which `int` does not take any more; later releases squeeze
    them first.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patched
