"""Rows of a source: local files, a dataset of the hub, or the built-in set.

Rows are read one at a time; no file is held in memory. A source that cannot be read is a
`UserError`; a single bad row is a `BadRow`, which the caller counts and reports.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import pyarrow

from neftune_dist.compat.datasets import fingerprint
from neftune_dist.config import BUILTIN_SOURCE, SourceConfig, UserError
from neftune_dist.config.limits import limited
from neftune_dist.data import builtin, fields, files, tables, text_files
from neftune_dist.data.errors import BadRow, Numbered
from neftune_dist.system.text import first_line

_SECONDS, _GIB = 60.0, 4.0  # limits of `read_row_file`, for a downloaded file
_MOST_LEVELS = 100  # of lists and objects in a row
_LFS = b"version https://git-lfs.github.com/"
_READING_ERRORS = (
    *(OSError, EOFError, ValueError, RecursionError, BadRow),
    *(zlib.error, csv.Error, pyarrow.ArrowException),
)
Rows = Iterator[tuple[str, "Mapping[str, Any] | BadRow"]]
T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """A readable source.

    Attributes:
        config: its settings.
        key, name: the setting that names it, and its value.
        digest: of its content.
        rows: pairs of a place and a row, or the reason why it is bad. A place is `row 7`, after
            the file's name where there are several. Rows count from 1; in a file of lines (JSON,
            CSV) the number is that of the line on which the row begins.
        left_out: names of the other files in a directory, such as those of other splits.
    """

    config: SourceConfig
    key: str
    name: str
    digest: str
    rows: Rows
    left_out: tuple[str, ...] = ()


def open_source(
    config: SourceConfig, key: str = "data.source", skip: Collection[str] = ()
) -> Source:
    """Open a source.

    Args:
        config: names it.
        key: the setting that does, for messages.
        skip: columns of Parquet and Arrow files that are null without being read.

    Raises:
        UserError: it cannot be read.
    """
    name = config.source
    if name == BUILTIN_SOURCE:
        _refuse_revision(config, key)
        rows = builtin.rows()
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return Source(config, key, name, digest, _with_places(enumerate(rows, 1)))
    if files.is_local(name):
        return _open_files(config, key, skip)
    if not files.HUB_ID.fullmatch(name):
        raise UserError(f"{key}={name} is neither a file nor a hub id such as org/name.")
    return _open_hub(config, key, skip)


def _refuse_revision(config: SourceConfig, key: str, has_splits: bool = False) -> None:
    if config.revision is not None or (config.split != SourceConfig.split and not has_splits):
        prefix = key.removesuffix("source")
        raise UserError(
            f"{prefix}split and {prefix}revision have no effect with {key}={config.source}, "
            "which is not a hub id (nor, for the first, a directory with splits): leave them out."
        )


def _open_files(config: SourceConfig, key: str, skip: Collection[str]) -> Source:
    found = files.find_files(config.source, key, config.split)
    _refuse_revision(config, key, found.has_splits)
    # Messages name the file of a row where there are several.
    root = os.path.commonpath([path.parent for path in found.paths])
    several = len(found.paths) > 1
    named = {path: str(path.relative_to(root)) if several else "" for path in found.paths}
    digests, states = [], {}
    for path, name in named.items():
        try:
            with path.open("rb") as file:
                if file.read(len(_LFS)) == _LFS:
                    raise UserError(
                        f"{key}={path} is a pointer of Git LFS, not the file: git lfs pull gets it."
                    )
                file.seek(0)
                states[path] = _state(path)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{key}={path} cannot be read: {error.strerror or error}.") from error
        digests.append((files.file_kind(path), digest, name))
    total = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    hidden = {*skip, *found.hidden}
    rows = chain.from_iterable(
        _with_places(_rows_of_file(path, key, hidden, states[path]), f"{name}, " if name else "")
        for path, name in named.items()
    )
    return Source(config, key, os.path.expanduser(config.source), total, rows, found.left_out)


def _open_hub(config: SourceConfig, key: str, skip: Collection[str]) -> Source:
    # Takes a second to import, with pandas; most sources are local files.
    import datasets

    name = config.source
    try:
        loaded = datasets.load_dataset(name, split=config.split, revision=config.revision)
    except Exception as error:  # the hub's clients raise a dozen unrelated types
        raise UserError(
            f"{key}={name} is not a local file, and the dataset of that name could not be "
            f"loaded from the hub: {first_line(error)}."
        ) from error
    batches = (b for table in loaded.with_format("arrow").iter(1000) for b in table.to_batches())
    rows = _with_places(enumerate(tables.rows(batches, skip), 1))
    return Source(config, key, f"{name}[{config.split}]", fingerprint(loaded), rows)


def _with_places(rows: Any, file: str = "") -> Rows:
    """Rows with their places, and without white space around their keys."""
    for number, row in rows:
        try:
            if not isinstance(row, BadRow):
                _refuse_depth(row)
                row = fields.stripped(row)
        except BadRow as error:
            row = error
        yield f"{file}row {number}", row


def _refuse_depth(row: Mapping[str, Any]) -> None:
    """Raise `BadRow` for nesting in which what looks into a row would leave Python's stack."""
    level: list[Any] = [row]
    for _ in range(_MOST_LEVELS):
        parts = [part.values() if isinstance(part, dict) else part for part in level]
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
        if not level:
            return
    raise BadRow(f"it nests lists and objects more than {_MOST_LEVELS} levels deep")


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written or replaced."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _rows_of_file(path: Path, key: str, skip: Collection[str], state: tuple[int, ...]) -> Numbered:
    """The rows of one file, which had a `state` when its digest was computed. An error that ends
    the reading names the last row before it."""
    kind, number = files.file_kind(path), 0
    try:
        for number, row in _READERS[kind](path, skip):
            yield number, row
        if _state(path) != state:  # else a cache entry would hold other rows than its name says
            raise UserError(f"{key}={path} was changed while it was read: run it again.")
    except TimeoutError:  # of the caller's limit
        raise
    except _READING_ERRORS as error:
        if isinstance(error, UnicodeDecodeError):
            flaw = "is not UTF-8 text"
        elif isinstance(error, zlib.error | gzip.BadGzipFile | EOFError):
            flaw = "is a damaged gzip file"
        elif isinstance(error, OSError) and path.suffix.lower() == ".zst":
            flaw = "is a damaged zstd file"
        elif isinstance(error, OSError) and error.errno:
            flaw = "cannot be read"
        else:
            tables_of = {"parquet": "a readable Parquet file", "arrow": "a readable Arrow file"}
            flaw = f"is not {tables_of.get(kind, f'valid {kind.upper()}')}"
        after = f" after row {number}" if number else ""
        reason = getattr(error, "strerror", None) or getattr(error, "msg", None)
        reason = reason or first_line(error)
        raise UserError(f"{key}={path} {flaw}{after}: {reason}.") from error


def read_row_file(
    name: str, key: str, convert: Callable[[Mapping[str, Any]], T], most: int = 0
) -> list[T]:
    """Read the rows of a local file that an evaluation needs whole: instructions, items of tasks,
    other models' answers. A row that cannot be used is an error, since figures over different rows
    could not be compared.

    Args:
        name: path of the file, of any kind that `data.source` takes.
        key: the setting that names it.
        convert: makes of a row what is kept; raises `BadRow`.
        most: rows to read; 0: all.

    Raises:
        UserError: there is no such file, it has no row, or one of them cannot be used.
    """
    if not files.is_local(name):
        raise UserError(f"{key}={name} is no file (.json or .jsonl, .gz too).")
    found = []
    with limited(_SECONDS, _GIB, UserError, f"{key}={name}"):
        for place, row in islice(open_source(SourceConfig(name), key).rows, most or None):
            try:
                if isinstance(row, BadRow):
                    raise row
                found.append(convert(row))
                _check_text(row)
            except BadRow as error:
                raise UserError(f"{key}={name}, {place}: {error}.") from error
    if not found:
        raise UserError(f"{key}={name} holds no row.")
    return found


def _check_text(row: Mapping[str, Any]) -> None:
    """Refuse a row with text that cannot be encoded, at any depth. Raises `BadRow`."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise BadRow(f"field {name!a} holds a lone surrogate, which is not text") from None


_READERS: dict[str, Callable[[Path, Collection[str]], Numbered]] = {
    "json": lambda path, skip: text_files.json_rows(path),
    "csv": lambda path, skip: text_files.table_rows(path, ","),
    "tsv": lambda path, skip: text_files.table_rows(path, "\t"),
    "parquet": tables.parquet_rows,
    "arrow": tables.arrow_rows,
}
