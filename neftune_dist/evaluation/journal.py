"""JSON objects, one a line, appended as they come: a killed process loses at most the last one."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from neftune_dist.config import UserError, parse_json, with_checksum
from neftune_dist.system import storage


def read_rows(path: Path, form: Any) -> list[Any]:
    """Rows that match the schema `form`; damaged lines and a line without an end are left out.
    Raises `UserError` where it cannot be read."""
    rows = []
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    for line in content.splitlines(keepends=True):
        if line.endswith(b"\n"):
            try:
                rows.append(parse_json(line, form, has_checksum=True))
            except ValueError:
                continue
    return rows


def digest(value: Any) -> str:
    """A name for what rows depend on; values that JSON lacks count by their text."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:24]


class Journal:
    """A file to which rows are added, by several threads. Raises `UserError` where it cannot be
    written."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        with storage.writing(str(path)), path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)  # without a line that was cut short

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put rows on the disk."""
        text = "".join(json.dumps(with_checksum(row)) + "\n" for row in rows)
        with self._lock, storage.writing(str(self._path)), self._path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
