"""Rows under other names: the settings `data.columns` and `data.ignore_fields`.

A mapping gives a field of ours the name of a column, a path into one (`data.0.text`), or a
constant.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from neftune_dist.data import fields
from neftune_dist.data.errors import BadRow, Hint

# Fields that a row may lack.
_OPTIONAL = ("system", "input", "context", "tools")
# Beside those that recognise a format, fields that all but plain texts may have.
_BESIDE = {"system", "system_prompt", "system_message", "tools"}
_ABOUT = {"input", "context"}  # fields that hold what an instruction is about
_ROLES = ("role", "from")
_BETTER = ("chosen", "preferred_output")  # of two answers to compare
_LISTS = ("messages", "conversations", "conversation", "prompt", "completion")
# The fields of ours for lists of turns, by the keys of a turn.
_TURNS = (
    ("messages", {"role", "content"}),
    ("conversations", {"from", "value"}),
    ("conversations", {"input", "output"}),
)
_ASKED = re.compile("question|instruction|prompt|query|problem|request|user|human|input|ask", re.I)
_THOUGHT = re.compile("reason|think|thought|(^|_)cot(_|$)", re.I)
_SAID = re.compile(
    "answer|response|completion|output|reply|solution|assistant|target|gpt|chosen|^preferred", re.I
)


class Columns:
    """Gives rows our names and leaves out the fields that the user said to ignore.

    Attributes:
        missing: optional columns of the mapping that no row had so far.
        ignored: names that were found and left out.
    """

    def __init__(
        self, mapping: Mapping[str, Any], ignore: Collection[str], key: str = "data.columns"
    ) -> None:
        self._mapping, self._key = mapping, key
        self._ignore = dict.fromkeys(ignore)  # in order
        self.missing = {
            path for field, path in mapping.items() if field in _OPTIONAL and isinstance(path, str)
        }
        self.ignored: set[str] = set()

    def apply(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row under our names. Raises `BadRow` where a column is missing."""
        if self._ignore:
            row = self._without_ignored(row)
        if not self._mapping:
            return row
        found, taken = dict[str, Any](), set()
        for field, path in self._mapping.items():
            if isinstance(path, dict):
                found[field] = path["constant"]
                continue
            try:
                top, found[field] = _follow(row, path)
            except LookupError:
                if field in _OPTIONAL:
                    continue
                raise BadRow(
                    f"{self._key} reads '{field}' from {path!a}, which is missing; there are "
                    f"{listed(row)}"
                ) from None
            taken.add(top)
            self.missing.discard(path)
        rest = {name: value for name, value in row.items() if name not in taken}
        for field in found.keys() & rest.keys():
            if rest[field] not in (None, ""):
                raise BadRow(
                    f"{self._key} gives '{field}', which the row has, too: name one of them, or "
                    "leave out the row's by ",
                    Hint(ignore=(field,)),
                )
        return rest | found

    def reason(self, error: BadRow, row: Mapping[str, Any]) -> str:
        """Why a row is bad. Its hints name the settings that are there already, too, which those
        that they advise would replace."""
        parts = (self._beside(part, row) if isinstance(part, Hint) else part for part in error.args)
        return "".join(map(str, parts))

    def _beside(self, hint: Hint, row: Mapping[str, Any]) -> str:
        # What the row has by the mapping alone: the hint names our field, the user its path.
        ours = {name: path for name, path in self._mapping.items() if name not in row}
        advised = {name: path.partition(".") for name, path in (hint.columns or {}).items()}
        unused = ours.keys() & {*hint.ignore, *(top for top, _, _ in advised.values())}
        columns = {name: path for name, path in self._mapping.items() if name not in unused}
        for name, (top, dot, rest) in advised.items():
            columns[name] = f"{ours.get(top, top)}{dot}{rest}" if dot else ours.get(top, top)
        left = (ours.get(name, name) for name in hint.ignore)
        tops = (
            path if path in row else path.partition(".")[0] for path in left if type(path) is str
        )
        ignore = tuple(dict.fromkeys((*self._ignore, *tops))) if hint.ignore else ()
        return Hint(columns if advised or unused else None, ignore).text(self._key)

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
        self.ignored |= self._ignore.keys() & found.keys()
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


def suggestions(row: Mapping[str, Any]) -> Iterator[Hint]:
    """Settings that may read a row of an unknown format, as far as names and types say; the best
    guess first."""
    turns: dict[str, str] = {}
    texts, thoughts, listed_texts = [], "", ""
    better = next((name for name in _BETTER if name in row), "")
    if not better and any(map(fields.is_compared, row)):
        return
    for name, value in row.items():
        if fields.is_harmless(name, value) or re.search(r"[,;:\t]", name) or name in _BESIDE:
            continue
        if fields.is_compared(name) and name != better:
            continue
        if field := _turns_in(value):
            turns = {field: name} if better in ("", name) else turns
        elif isinstance(value, list) and len(value) > 1 and isinstance(value[0], str):
            listed_texts = name
        paths = _texts_in(name, value)
        if paths and _THOUGHT.search(name):
            thoughts = paths[0]
        else:
            texts += paths
    if better and "prompt" in row:
        yield _hint(row, {"completion": better})
    if turns:
        yield _hint(row, turns)
    # A list of texts is a conversation if it stands alone; beside a question it is its answers.
    if listed_texts and len(texts) == 1:
        yield _hint(row, {"conversations": listed_texts})
    if len(texts) > 1:
        answers = re.compile(rf"{better}(\.|$)") if better else _SAID
        said = next((name for name in texts if answers.search(name)), None)
        asked = next((name for name in texts if _ASKED.search(name) and name != said), None)
        asked = asked or next(name for name in texts if name != said)
        said = said or next(name for name in texts if name != asked)
        # What an instruction is about.
        about = next((n for n in row if n.lower() in _ABOUT and n not in (asked, said)), "")
        ours = ("instruction", "output") if about else ("prompt", "completion")
        found = {ours[0]: asked, ours[1]: said}
        if about and about not in _ABOUT:
            found[about.lower()] = about
        yield _hint(row, found | ({"reasoning": thoughts} if thoughts else {}))
    elif texts and not (_SAID.search(texts[0]) or _ASKED.search(texts[0])):
        yield _hint(row, {"text": texts[0]})


def _hint(row: Mapping[str, Any], found: dict[str, str]) -> Hint:
    """The mapping, with the fields to leave out: all that are neither harmless nor read."""
    used = {path.partition(".")[0] for path in found.values()}
    if "text" not in found:
        used |= _BESIDE
    if "instruction" in found:
        used |= _ABOUT
    if "completion" in found:
        used.add("prompt")
    left = (name for name, value in row.items() if not fields.is_harmless(name, value))
    return Hint(found, tuple(name for name in left if name not in used))


def _turns_in(value: Any) -> str:
    """The field of ours whose form a list of turns has; "" for anything else."""
    if not isinstance(value, list) or len(value) < 2 or not isinstance(value[0], dict):
        return ""
    return next((field for field, keys in _TURNS if value[0].keys() >= keys), "")


def _texts_in(path: str, value: Any) -> list[str]:
    """Paths of the texts in a value: of a list of texts the first (alternatives), of a list of
    several objects none, since the others would be lost."""
    if isinstance(value, str):
        return [path] if value else []
    parts = list(value.items()) if isinstance(value, dict) else []
    parts = [(k, v) for k, v in parts if k not in _ROLES and not fields.is_harmless(k, v)]
    if isinstance(value, list) and (len(value) == 1 or all(isinstance(v, str) for v in value)):
        parts = list(enumerate(value[:1]))
    return [text for name, part in parts for text in _texts_in(f"{path}.{name}", part)]
