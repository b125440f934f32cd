"""Files of other projects that this repository may not hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("NEFTUNE_DIST_TEST_DATA", Path(__file__).parents[3] / "shared"))


ROOT = Path(__file__).parents[2]
SMOLLM2 = Path.home() / ".cache" / "neftune_dist" / "smollm2-135m-instruct"


def shared(name: str) -> Path:
    """The path of such a file; the test that asks for it is skipped where it is missing."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is missing (set NEFTUNE_DIST_TEST_DATA)")
    return path


def smollm2_files() -> Path:
    """SmolLM2-135M-Instruct as a model directory, converted once into the user's cache; the test is
    skipped where it cannot be made."""
    made = subprocess.run(
        [sys.executable, str(ROOT / "launcher" / "smollm2.py"), str(SMOLLM2)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"SmolLM2 cannot be made: {made.stderr.strip()[-300:]}")
    return SMOLLM2
