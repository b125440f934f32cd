"""Rows under other names: the settings `data.columns` and `data.ignore_fields`.

A mapping gives a field of ours the name of a column, a path into one (`data.0.text`), or a
constant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from neftune_dist.data import fields
from neftune_dist.data.errors import BadRow

# Fields that a row may lack.
_OPTIONAL = ("system", "input", "context", "tools")
_LISTS = ("messages", "conversations", "conversation", "prompt", "completion")
# The fields of ours for lists of turns, by the keys of a turn.
_TURNS = (
    ("messages", {"role", "content"}),
    ("conversations", {"from", "value"}),
    ("conversations", {"input", "output"}),
)
_ASKED = re.compile("question|instruction|prompt|query|problem|request|user|human|input|ask", re.I)
_NO_TEXT = re.compile(r"[-+.\deE]*|null|true|false|yes|no|on|off|~", re.I)  # to YAML, unquoted
_THOUGHT = re.compile("reason|think|thought|(^|_)cot(_|$)", re.I)
_SAID = re.compile("answer|response|completion|output|reply|solution|assistant|target|gpt", re.I)


class Columns:
    """Gives rows our names and leaves out the fields that the user said to ignore.

    Attributes:
        missing: optional columns of the mapping that no row had so far.
        ignored: names that were found and left out.
    """

    def __init__(self, mapping: Mapping[str, Any], ignore: Collection[str]) -> None:
        self._paths = {field: path for field, path in mapping.items() if isinstance(path, str)}
        self._constants = {
            field: value["constant"] for field, value in mapping.items() if isinstance(value, dict)
        }
        self._ignore = frozenset(ignore)
        self.missing = {path for field, path in self._paths.items() if field in _OPTIONAL}
        self.ignored: set[str] = set()

    def apply(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row under our names. Raises `BadRow` where a column is missing."""
        if self._ignore:
            row = self._without_ignored(row)
        if not self._paths and not self._constants:
            return row
        found: dict[str, Any] = dict(self._constants)
        taken = set()
        for field, path in self._paths.items():
            try:
                top, found[field] = _follow(row, path)
            except LookupError:
                if field in _OPTIONAL:
                    continue
                raise BadRow(
                    f"data.columns reads '{field}' from {path!a}, which is missing; there are "
                    f"{listed(row)}"
                ) from None
            taken.add(top)
            self.missing.discard(path)
        rest = {name: value for name, value in row.items() if name not in taken}
        for field in found.keys() & rest.keys():
            if rest[field] not in (None, ""):
                raise BadRow(
                    f"data.columns gives '{field}', which the row has, too: name one of them, or "
                    f"leave out the row's by data.ignore_fields={field}"
                )
        return rest | found

    def _without_ignored(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row, its turns and their calls without the ignored fields."""
        kept: dict[str, Any] = self._kept(row)
        for field in _LISTS:
            if isinstance(kept.get(field), list):
                turns = kept[field] = [self._kept(turn) for turn in kept[field]]
                for turn in turns:
                    if isinstance(turn, dict) and isinstance(turn.get("tool_calls"), list):
                        turn["tool_calls"] = [self._kept(call) for call in turn["tool_calls"]]
        return kept

    def _kept(self, found: Any) -> Any:
        if not isinstance(found, dict):
            return found
        self.ignored |= self._ignore & found.keys()
        return {name: value for name, value in found.items() if name not in self._ignore}


def _follow(row: Any, path: str) -> tuple[str, Any]:
    """The top field of a path, and its value. Raises `LookupError`."""
    if path in row:
        return path, row[path]
    top, *rest = path.split(".")
    value = row[top]
    for part in rest:
        if isinstance(value, list) and re.fullmatch(r"-?\d{1,9}", part):
            value = value[int(part)]
        elif isinstance(value, dict):
            value = value[part]
        else:
            raise LookupError(part)
    return top, value


def listed(row: Mapping[str, Any]) -> str:
    """The names of a row's fields for a message, in quotes where white space would not be seen."""
    names = (ascii(name) if name != name.strip() else ascii(name)[1:-1] for name in row)
    text = ", ".join(names) or "(none)"
    return text if len(text) <= 80 else f"{text[:75]}[...]"


def suggestion(row: Mapping[str, Any]) -> str:
    """The settings that would read a row of an unknown format, as far as names and types say; ""
    without an idea."""
    found, texts, thoughts, listed_texts = {}, [], "", ""
    for name, value in row.items():
        if fields.is_harmless(name, value) or re.search(r"[,;:\t]", name):
            continue
        if field := _turns_in(value):
            found = {field: name}
        elif isinstance(value, list) and len(value) > 1 and isinstance(value[0], str):
            listed_texts = name
        paths = _texts_in(name, value)
        if paths and _THOUGHT.search(name):
            thoughts = paths[0]
        else:
            texts += paths
    # A list of texts is a conversation if it stands alone; beside a question it is its answers.
    if listed_texts and len(texts) == 1:
        found = {"conversations": listed_texts}
    if not found and len(texts) > 1:
        said = next((name for name in texts if _SAID.search(name)), None)
        asked = next((name for name in texts if _ASKED.search(name) and name != said), None)
        asked = asked or next(name for name in texts if name != said)
        said = said or next(name for name in texts if name != asked)
        # An instruction's input or context is read without a mapping.
        about = {"input", "context"} & row.keys() - {asked, said}
        ours = ("instruction", "output") if about else ("prompt", "completion")
        found = {ours[0]: asked, ours[1]: said} | ({"reasoning": thoughts} if thoughts else {})
    elif not found and texts and not (_SAID.search(texts[0]) or _ASKED.search(texts[0])):
        found = {"text": texts[0]}
    if not found:
        return ""
    used = {path.partition(".")[0] for path in found.values()}
    left = [name for name, value in row.items() if not fields.is_harmless(name, value)]
    left = [name for name in left if name not in used and name not in _OPTIONAL]
    quoted = {ours: f"'{at}'" if _NO_TEXT.fullmatch(at) else at for ours, at in found.items()}
    mapped = ", ".join(f"{ours}: {theirs}" for ours, theirs in quoted.items())
    ignored = f" data.ignore_fields={','.join(left)}" if left else ""
    made = f"data.columns={{{mapped}}}{ignored}"
    return made if len(made) < 150 and made.isascii() and made.isprintable() else ""


def _turns_in(value: Any) -> str:
    """The field of ours whose form a list of turns has; "" for anything else."""
    if not isinstance(value, list) or len(value) < 2:
        return ""
    if isinstance(value[0], dict):
        return next((field for field, keys in _TURNS if value[0].keys() >= keys), "")
    return ""


def _texts_in(path: str, value: Any) -> list[str]:
    """Paths of the texts in a value: of a list of texts the first (alternatives), of a list of
    several objects none, since the others would be lost."""
    if isinstance(value, str):
        return [path] if value else []
    parts = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and (len(value) == 1 or all(isinstance(v, str) for v in value)):
        parts = list(enumerate(value[:1]))
    return [text for name, part in parts for text in _texts_in(f"{path}.{name}", part)]
