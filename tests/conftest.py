"""The environment of all tests and of the processes that they start; signals left as they were."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Read when torch or a hub client is imported, so before any test is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# By default every rank that compiles starts a pool of processes, each of which imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Else every process that compiles loads a library for each set of instructions, and the first
# compiles them: 8 s, then more than 1 s each. What cannot be compiled fails by itself.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """What a test runs in this process may leave signals ignored, as a run does at its end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
