"""Tags for memory, set where it is allocated; `neftune-dist plan` splits a peak by them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_tag: ContextVar[str | None] = ContextVar("memory_tag", default=None)


@contextmanager
def memory_tag(kind: str) -> Iterator[None]:
    """Tag the tensors that are made within the block with one of `planning.memory.KINDS`."""
    before = _tag.set(kind)
    try:
        yield
    finally:
        _tag.reset(before)


def current_memory_tag() -> str | None:
    """Return the innermost tag, None where there is none."""
    return _tag.get()
