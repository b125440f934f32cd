"""The error of a user's mistake, and how values are shown in its message."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake that the user can fix: one sentence on what is wrong, where, and what is right.

    The command line prints the sentence, without a traceback, and exits with code 2.

    Attributes:
        shared: all ranks raised it together, so only rank 0 needs to print it.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


def brief(value: Any) -> str:
    """A value as text of at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
