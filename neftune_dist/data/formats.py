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
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import pyarrow
import pyarrow.parquet

from neftune_dist.config import BUILTIN_SOURCE, DataConfig, UserError
from neftune_dist.data import builtin

ROLES = ("system", "user", "assistant")
_SUFFIXES = (".json", ".jsonl", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class BadRow(Exception):
    """One row that cannot be used, and why; the caller knows which row it was."""


@dataclass(frozen=True)
class Conversation:
    """Turns of (role, content), roles of `ROLES`.

    context: the `input` of an Alpaca row, which the Alpaca prompt sets apart from the instruction.
    extra: the row's other text fields, kept for evaluation (the built-in set's `task`).
    """

    turns: tuple[tuple[str, str], ...]
    context: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes it; an Alpaca row's context follows its instruction."""
        messages = [{"role": role, "content": content} for role, content in self.turns]
        if self.context:
            messages[0]["content"] += "\n\n" + self.context
        return messages


@dataclass(frozen=True)
class Source:
    """A readable source: its name, a digest of its content, and its rows.

    rows: pairs of a place, as "FILE, row 7" (rows count from 1), and the row or what is wrong.
    """

    name: str
    digest: str
    rows: Iterator[tuple[str, Mapping[str, Any] | BadRow]]


def open_source(config: DataConfig) -> Source:
    """The source named by `data.source`. Raises `UserError` where it cannot be read."""
    name = config.source
    if name == BUILTIN_SOURCE:
        rows = builtin.rows()
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return Source(
            name, digest, ((f"built-in set, row {i}", row) for i, row in enumerate(rows, 1))
        )
    path = Path(name).expanduser()
    looks_local = path.exists() or name.startswith(("/", ".", "~")) or _suffix(path) in _SUFFIXES
    if looks_local:
        return _open_file(path)
    if not _HUB_ID.fullmatch(name):
        raise UserError(f"data.source={name} is neither a file nor a hub id such as org/name.")
    return _open_hub(config)


def _suffix(path: Path) -> str:
    suffixes = path.suffixes
    return "".join(suffixes[-2:-1] if path.suffix == ".gz" else suffixes[-1:]).lower()


def _open_file(path: Path) -> Source:
    if not path.exists():
        raise UserError(f"data.source={path} does not exist.")
    suffix = _suffix(path)
    if suffix not in _SUFFIXES or path.is_dir():
        raise UserError(f"data.source={path} must be a .json, .jsonl or .parquet file (.gz too).")
    try:
        digest = _digest(path)
        if suffix == ".parquet":
            return Source(str(path), digest, _parquet_rows(path))
        return Source(str(path), digest, _json_rows(path))
    except OSError as error:
        raise UserError(f"data.source={path} cannot be read: {error.strerror or error}.") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    try:
        with _open_text(path) as file:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            if first == "[":
                yield from _rows_of_array(path, json.load(file))
                return
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                where = f"{path}, row {number}"
                try:
                    yield where, _mapping(json.loads(line))
                except (json.JSONDecodeError, RecursionError) as error:
                    yield where, BadRow(f"not valid JSON ({error})")
                except BadRow as error:
                    yield where, error
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"data.source={path} is not valid JSON: {error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.source={path} is not UTF-8 text: {error}.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"data.source={path} is a damaged gzip file: {error}.") from error
    except OSError as error:
        raise UserError(f"data.source={path} cannot be read: {error.strerror or error}.") from error


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(path), encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _rows_of_array(path: Path, rows: list[Any]) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    for number, row in enumerate(rows, 1):
        try:
            yield f"{path}, row {number}", _mapping(row)
        except BadRow as error:
            yield f"{path}, row {number}", error


def _mapping(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise BadRow(f"not an object of fields but {type(row).__name__}")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | BadRow]]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
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
    rows = ((f"{name}[{config.split}], row {i}", row) for i, row in enumerate(loaded, 1))
    return Source(f"{name}[{config.split}]", loaded._fingerprint, rows)


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format whose fields the row has, or None."""
    for name, needed in (
        ("messages", {"messages"}),
        ("alpaca", {"instruction", "output"}),
        ("prompt_completion", {"prompt", "completion"}),
    ):
        if needed <= set(row):
            return name
    return None


def to_conversation(row: Mapping[str, Any], format_name: str) -> Conversation:
    """The row as a conversation. Raises `BadRow` naming the field that is missing or wrong."""
    if format_name == "alpaca":
        turns = (("user", _text(row, "instruction")), ("assistant", _text(row, "output")))
        context = _text(row, "input") if row.get("input") is not None else ""
        extra = (("task", row["task"]),) if isinstance(row.get("task"), str) else ()
        return Conversation(turns, context, extra)
    if format_name == "prompt_completion":
        return Conversation(
            (("user", _text(row, "prompt")), ("assistant", _text(row, "completion")))
        )
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRow("field 'messages' is missing or not a list of turns")
    turns_list = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise BadRow(f"turn {number} is not an object with 'role' and 'content'")
        role = message.get("role")
        if role not in ROLES:
            raise BadRow(f"turn {number} has the role {role!r}; known: {', '.join(ROLES)}")
        try:
            turns_list.append((str(role), _text(message, "content")))
        except BadRow as error:
            raise BadRow(f"turn {number}: {error}") from None
    if not any(role == "assistant" and content.strip() for role, content in turns_list):
        raise BadRow("no turn of the assistant to learn from")
    return Conversation(tuple(turns_list))


def _text(row: Mapping[str, Any], field: str) -> str:
    if field not in row:
        raise BadRow(f"field '{field}' is missing")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"field '{field}' is not text but {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"field '{field}' holds a lone surrogate, which is no text") from None
    return value
