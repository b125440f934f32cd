"""The built-in instruction set: short tasks whose answers an exact match can check.

The rows are shipped beside this module; `tests/support/builtin_generator.py` made them. They are
not split: callers hold rows out by their prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

_ROWS = Path(__file__).with_name("builtin.jsonl")


def rows() -> list[dict[str, str]]:
    """All rows, with the fields instruction, input, output and task; one of each task in turn."""
    return [json.loads(line) for line in _ROWS.read_text("ascii").splitlines()]


def exact_match(answer: str, expected: str) -> bool:
    """Whether two answers are equal, up to white space and one full stop at the end."""
    return _canonical(answer) == _canonical(expected)


def _canonical(answer: str) -> str:
    return " ".join(answer.split()).removesuffix(".")
