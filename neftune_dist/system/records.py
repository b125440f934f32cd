"""The records of a run, one JSON object a line: metrics.jsonl, evaluations.jsonl, samples.jsonl.

A damaged line is left out and counted; the others are read all the same. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

STEPS, EVALUATIONS, SAMPLES = "metrics.jsonl", "evaluations.jsonl", "samples.jsonl"


@dataclass(frozen=True)
class Records:
    """The records of a file.

    Attributes:
        rows: each with a `step`; one a step (of samples: a step and `index`), the last that was
            written, in order.
        num_lost: lines that are no records. A last line without an end is not counted: whoever
            wrote it was killed meanwhile, and that step has not been saved.
    """

    rows: list[dict[str, Any]]
    num_lost: int

    def num_missing(self, last: int) -> int:
        """Count the missing records from the first one to `last`, in a file with one a step."""
        steps = {row["step"] for row in self.rows}
        return sum(step not in steps for step in range(min(steps, default=last + 1), last + 1))


def read_records(path: Path, numbers: Sequence[str] = (), last_bytes: int | None = None) -> Records:
    """Read a file of records; one that does not exist has none. Raises `OSError`.

    Args:
        path: of the file.
        numbers: keys that every record must have, beside its step, as a number or null.
        last_bytes: read no more than so many, at the end of the file.
    """
    if not path.exists():
        return Records([], 0)
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        first = max(0, size - last_bytes) if last_bytes is not None else 0
        file.seek(first)
        lines = file.read().split(b"\n")
    if first:
        lines = lines[1:]  # of which the beginning is missing
    rows = [_record(line, numbers) for line in lines[:-1] if line.strip()]
    found = [row for row in rows if row is not None]
    lost = len(rows) - len(found)
    # The last line ends with the file only where it was cut short.
    if lines and (row := _record(lines[-1], numbers)) is not None:
        found.append(row)
    found.sort(key=lambda row: row["step"])
    unique = {(row["step"], str(row.get("index"))): row for row in found}
    return Records(list(unique.values()), lost)


def _record(line: bytes, numbers: Sequence[str]) -> dict[str, Any] | None:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(step := row.get("step"), int):
        return None
    if isinstance(step, bool) or step < 0:
        return None
    missing = object()
    values = [row.get(name, missing) for name in numbers]
    return row if all(value is None or is_finite(value) for value in values) else None


def is_finite(value: Any) -> bool:
    """Whether it is a number that float can hold, and no infinity or NaN."""
    with suppress(OverflowError, TypeError):
        return math.isfinite(value)
    return False


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
