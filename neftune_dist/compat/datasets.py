"""Private parts of datasets. Checked against 5.2.0."""

from __future__ import annotations

from typing import Any


def fingerprint(dataset: Any) -> str:
    """Return the hash by which datasets knows a dataset in its own cache."""
    return str(dataset._fingerprint)
