"""A user's mistake, and how a value is shown in it."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A mistake that the user can mend: one sentence saying what, where, and what would be right.

    The command line prints the sentence, without a traceback, and exits with code 2.

    Attributes:
        shared: all ranks raised it together, so that rank 0 alone need say it.
    """

    def __init__(self, message: str, *, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


def brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
