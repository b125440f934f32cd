"""Rows of any supported source, as conversations.

Owns reading (local JSON, JSON lines and Parquet, gzip too; hub ids through `datasets`; the built-in
set) and the recognition of row formats. A source that cannot be read is a `UserError`; a single bad
row is a `BadRow`, which the caller counts and reports.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from neftune_dist.config import BUILTIN_SOURCE, DataConfig, UserError
from neftune_dist.data import builtin

ROLES = ("system", "user", "assistant", "tool")
_SUFFIX = re.compile(r"(\.jsonl?|\.parquet(?!\.gz))(\.gz)?$")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

Rows = Iterator[tuple[int, "Mapping[str, Any] | BadRow"]]


class BadRow(Exception):
    """One row that cannot be used, and why; the caller knows which row it was."""


class Turn(NamedTuple):
    """What one role of `ROLES` says.

    tool_calls: what an assistant calls beside its content, or in its place: a JSON list of OpenAI's
        form, `{"type": "function", "function": {"name": ..., "arguments": {...}}}`; or nothing.
    """

    role: str
    content: str
    tool_calls: str = ""


@dataclass(frozen=True)
class Conversation:
    """Turns, of which at least one is an answer; or a plain text, which has none.

    context: the `input` of an Alpaca row, which the Alpaca prompt sets apart from the instruction.
    extra: the row's other text fields, kept for evaluation (the built-in set's `task`).
    tools: what the assistant may call: a JSON list of the functions' schemas, or nothing.
    text: of a document without turns: it goes through no template and is learned whole.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    extra: tuple[tuple[str, str], ...] = ()
    tools: str = ""
    text: str = ""

    def messages(self) -> list[dict[str, Any]]:
        """As a chat template takes it; an Alpaca row's context follows its instruction. The key
        `tool_calls` is there where there are any."""
        messages = []
        for turn in self.turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if turn.tool_calls:
                message["tool_calls"] = json.loads(turn.tool_calls)
            messages.append(message)
        if self.context:
            asked = next(message for message in messages if message["role"] == "user")
            asked["content"] += "\n\n" + self.context
        return messages

    def opening(self) -> list[dict[str, Any]]:
        """The messages in front of the first answer; none of a plain text."""
        roles = [turn.role for turn in self.turns]
        return self.messages()[: roles.index("assistant")] if roles else []


@dataclass(frozen=True)
class Source:
    """A readable source: its name, a digest of its content, and its rows.

    rows: pairs of a number and the row, or what is wrong with it. Rows count from 1; in a file of
        JSON lines, blank lines count, so that the number is the line's.
    """

    name: str
    digest: str
    rows: Rows


def open_source(config: DataConfig) -> Source:
    """The source named by `data.source`. Raises `UserError` where it cannot be read."""
    name = config.source
    if name == BUILTIN_SOURCE:
        _refuse_revision(config)
        rows = builtin.rows()
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return Source(name, digest, enumerate(rows, 1))
    path = Path(os.path.expanduser(name))
    if name.startswith(("/", ".", "~")) or _suffix(path) or os.path.exists(path):
        _refuse_revision(config)
        return _open_file(path)
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"data.source={name} is neither a file nor a hub id such as org/name.")
    return _open_hub(config)


def _refuse_revision(config: DataConfig) -> None:
    if config.revision is not None or config.split != DataConfig.split:
        raise UserError(
            f"data.split and data.revision have no effect with data.source={config.source}, which "
            "is no hub id: leave them out."
        )


def _suffix(path: Path) -> str:
    """The suffix that tells how to read a file, or nothing."""
    found = _SUFFIX.search(path.name.lower())
    return found[1] if found else ""


def _open_file(path: Path) -> Source:
    if not os.path.exists(path):
        raise UserError(f"data.source={path} does not exist.")
    suffix = _suffix(path)
    if not suffix or not path.is_file():
        what = "is a directory" if path.is_dir() else "cannot be read"
        raise UserError(
            f"data.source={path} {what}: give a .json, .jsonl (.gz too) or .parquet file."
        )
    try:
        digest = _digest(path)
    except OSError as error:
        raise UserError(f"data.source={path} cannot be read: {error.strerror or error}.") from error
    return Source(str(path), digest, (_parquet_rows if suffix == ".parquet" else _json_rows)(path))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_rows(path: Path) -> Rows:
    try:
        with _open_text(path) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            if first == "[":
                yield from enumerate(map(_mapping, json.load(file)), 1)
                return
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, _parse(line)
    except UnicodeDecodeError as error:
        raise UserError(f"data.source={path} is not UTF-8 text: {error}.") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits is a ValueError
        raise UserError(f"data.source={path} is not valid JSON: {error}.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.source={path} is a damaged gzip file: {error}.") from error
    except OSError as error:
        raise UserError(f"data.source={path} cannot be read: {error.strerror or error}.") from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _parse(line: str) -> Mapping[str, Any] | BadRow:
    try:
        return _mapping(json.loads(line))
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON ({error})")


def _mapping(row: Any) -> Mapping[str, Any] | BadRow:
    return row if isinstance(row, dict) else BadRow(f"not an object of fields but {_kind(row)}")


def _parquet_rows(path: Path) -> Rows:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"data.source={path} is not a readable Parquet file: {error}.") from error


def _open_hub(config: DataConfig) -> Source:
    name = config.source
    try:
        loaded = datasets.load_dataset(name, split=config.split, revision=config.revision)
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"data.source={name} is no local file, and the dataset of that name could not be "
            f"loaded from the hub: {reason}"
        ) from error
    return Source(f"{name}[{config.split}]", loaded._fingerprint, enumerate(loaded, 1))


def detect_format(row: Mapping[str, Any]) -> str:
    """The format whose fields the row has. Raises `BadRow` where it has those of none."""
    for name, needed in (
        ("messages", {"messages"}),
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
    ):
        if needed <= set(row):
            return name
    found = ", ".join(ascii(key)[1:-1] for key in row) or "(none)"
    raise BadRow(
        f"the fields {shorten(found, 80)} are of no known format "
        "(messages; instruction, output; prompt, completion)"
    )


def to_conversation(row: Mapping[str, Any], format_name: str) -> Conversation:
    """The row as a conversation with an answer.

    Raises `BadRow` naming the field that is missing or wrong.
    """
    if format_name == "alpaca":
        context = _text(row, "input") if row.get("input") is not None else ""
        extra = (("task", row["task"]),) if isinstance(row.get("task"), str) else ()
        return _answered(_pair(row, "instruction", "output"), context, extra)
    if format_name == "prompt_completion":
        return _answered(_pair(row, "prompt", "completion"))
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' is missing or not a list of turns")
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRow(f"turn {number} is not an object with 'role' and 'content'")
        try:
            role, content = _text(message, "role"), _text(message, "content")
        except BadRow as error:
            raise BadRow(f"turn {number}: {error}") from None
        if role not in ROLES:
            raise BadRow(f"turn {number} has the role {role[:40]!r}; known: {', '.join(ROLES)}")
        turns.append(Turn(role, content))
    if turns[0].role == "assistant":
        raise BadRow("the first turn is the assistant's, with nothing that it answers")
    return _answered(tuple(turns))


def _pair(row: Mapping[str, Any], asked: str, answered: str) -> tuple[Turn, ...]:
    return Turn("user", _text(row, asked)), Turn("assistant", _text(row, answered))


def _answered(
    turns: tuple[Turn, ...],
    context: str = "",
    extra: tuple[tuple[str, str], ...] = (),
) -> Conversation:
    if not any(turn.role == "assistant" and turn.content.strip() for turn in turns):
        raise BadRow("the answer is empty")
    return Conversation(turns, context, extra)


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise BadRow(f"field '{field}' is missing")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"field '{field}' is not text but {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"field '{field}' holds a lone surrogate, which is no text") from None
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
