"""Errors of single rows."""

from __future__ import annotations

from typing import Any

# A longer row is taken for a damaged file.
LONGEST_ROW_BYTES = 64 * 2**20


class BadRow(Exception):
    """One row cannot be used; the message says why, the caller knows which row it was."""


def type_name(value: Any) -> str:
    """A value's type, as messages name it."""
    if isinstance(value, list) and not value:
        return "an empty list"
    return "null" if value is None else type(value).__name__
