"""Files of other projects that this repository may not hold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("NEFTUNE_DIST_TEST_DATA", Path(__file__).parents[3] / "shared"))


def shared(name: str) -> Path:
    """The path of such a file; the test that asks for it is skipped where it is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing (set NEFTUNE_DIST_TEST_DATA)")
    return path
