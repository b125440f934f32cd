"""Rows as files give them, and errors of single rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

# A longer row is taken for a damaged file.
LONGEST_ROW_BYTES = 64 * 2**20
_NO_TEXT = re.compile(r"[-+.\deE]*|null|true|false|yes|no|on|off|~", re.I)  # to YAML, unquoted


class Hint(NamedTuple):
    """Settings that would read a row: columns under our names, and fields to leave out."""

    columns: Mapping[str, Any] | None = None
    ignore: tuple[str, ...] = ()

    def text(self, key: str = "data.columns") -> str:
        """The settings as words of a command, with `key` for the first."""
        mapping = (self.columns or {}).items()
        mapped = ", ".join(f"{ours}: {_yaml(theirs)}" for ours, theirs in mapping)
        words = [] if self.columns is None else [f"{key}={{{mapped}}}"]
        words += [f"data.ignore_fields={','.join(self.ignore)}"] * bool(self.ignore)
        text = " ".join(words)
        return text if text.isprintable() else ascii(text)[1:-1]

    def __str__(self) -> str:
        return self.text()


class BadRow(Exception):
    """One row cannot be used; the message says why, the caller knows which row it was.

    The message is the concatenation of the arguments. A `Hint` among them is completed by the
    settings that are there already, where they are known (`Columns.reason`).
    """

    def __str__(self) -> str:
        return "".join(map(str, self.args))


Numbered = Iterator[tuple[int, Mapping[str, Any] | BadRow]]  # rows with their numbers, from 1


def _yaml(value: Any) -> str:
    """A column, or a constant, within braces of YAML."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return f"'{value}'" if _NO_TEXT.fullmatch(value) else str(value)


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
