"""What is wrong with one row of a source."""

from __future__ import annotations

# What is longer is a damaged file rather than a row.
LONGEST_ROW_BYTES = 64 * 2**20


class BadRow(Exception):
    """One row that cannot be used, and why; the caller knows which row it was."""
