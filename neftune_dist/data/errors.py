"""Rows as files give them, and errors of single rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

# A longer row is taken for a damaged file.
LONGEST_ROW_BYTES = 64 * 2**20


class BadRow(Exception):
    """One row cannot be used; the message says why, the caller knows which row it was."""


Numbered = Iterator[tuple[int, Mapping[str, Any] | BadRow]]  # rows with their numbers, from 1


def type_name(value: Any) -> str:
    """A value's type, as messages name it."""
    if isinstance(value, list) and not value:
        return "an empty list"
    return "null" if value is None else type(value).__name__


def parse_json(text: str) -> Any:
    """The value of JSON text. Raises `BadRow`, also where an object has a key twice."""
    try:
        return JSON.decode(text)
    except RecursionError:
        raise BadRow("not valid JSON (nested too deeply)") from None
    except ValueError as error:  # a number of too many digits is one, too
        raise BadRow(f"not valid JSON ({error})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise BadRow(f"not valid JSON (an object has the key {twice[:40]!a} twice)")
    return found


JSON = json.JSONDecoder(object_pairs_hook=_object)
