"""Rows of a source: local files, a dataset of the hub, or the built-in set.

Rows are read one at a time; no file is held in memory. A source that cannot be read is a
`UserError`; a single bad row is a `BadRow`, which the caller counts and reports.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow

from neftune_dist.compat.datasets import fingerprint
from neftune_dist.config import BUILTIN_SOURCE, SourceConfig, UserError
from neftune_dist.data import builtin, files, tables
from neftune_dist.data.errors import LONGEST_ROW_BYTES, BadRow, type_name
from neftune_dist.system.text import first_line

_PIECE_CHARACTERS = 2**20  # of a JSON array, read at a time; more in a long element
_LONGEST_PIECE = 2**24
_BOM = b"\xef\xbb\xbf"
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet", b"ARROW1": ".arrow"}

Numbered = Iterator[tuple[int, "Mapping[str, Any] | BadRow"]]
Rows = Iterator[tuple[str, "Mapping[str, Any] | BadRow"]]


@dataclass(frozen=True)
class Source:
    """A readable source.

    Attributes:
        key, name: the setting that names it, and its value.
        digest: of its content.
        rows: pairs of a place and a row, or the reason why it is bad. A place is `row 7`, after
            the file's name where there are several. Rows count from 1; in a file of lines (JSON,
            CSV) the number is that of the line on which the row begins.
        left_out: names of the other files in a directory.
    """

    key: str
    name: str
    digest: str
    rows: Rows
    left_out: tuple[str, ...] = ()


def open_source(config: SourceConfig, key: str = "data.source") -> Source:
    """Open a source; `key` names the setting in messages. Raises `UserError` where it cannot be
    read."""
    name = config.source
    if name == BUILTIN_SOURCE:
        _refuse_revision(config, key)
        rows = builtin.rows()
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        return Source(key, name, digest, _with_places(enumerate(rows, 1)))
    if files.is_local(name):
        _refuse_revision(config, key)
        return _open_files(name, key)
    if not files.HUB_ID.fullmatch(name):
        raise UserError(f"{key}={name} is neither a file nor a hub id such as org/name.")
    return _open_hub(config, key)


def _refuse_revision(config: SourceConfig, key: str) -> None:
    if config.revision is not None or config.split != SourceConfig.split:
        prefix = key.removesuffix("source")
        raise UserError(
            f"{prefix}split and {prefix}revision have no effect with {key}={config.source}, "
            "which is not a hub id: leave them out."
        )


def _open_files(name: str, key: str) -> Source:
    found = files.find_files(name, key)
    digests = []
    for path in found.paths:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{key}={path} cannot be read: {error.strerror or error}.") from error
        digests.append((files.file_kind(path), digest))
    total = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    rows = _rows_of_files(found.paths, key)
    return Source(key, os.path.expanduser(name), total, rows, found.left_out)


def _open_hub(config: SourceConfig, key: str) -> Source:
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
    rows = _with_places(enumerate(loaded, 1))
    return Source(key, f"{name}[{config.split}]", fingerprint(loaded), rows)


def _with_places(rows: Any, file: str = "") -> Rows:
    for number, row in rows:
        yield f"{file}row {number}", row


def _rows_of_files(paths: tuple[Path, ...], key: str) -> Rows:
    root = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        file = f"{os.path.relpath(path, root)}, " if len(paths) > 1 else ""
        yield from _with_places(_rows_of_file(path, key), file)


def _rows_of_file(path: Path, key: str) -> Numbered:
    """The rows of one file. An error that ends the reading names the last row before it."""
    setting, kind, number = f"{key}={path}", files.file_kind(path), 0
    try:
        for number, row in _READERS[kind](path):
            yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{setting} is not UTF-8 text{_after(number)}: {error}.") from error
    except (zlib.error, gzip.BadGzipFile, EOFError) as error:
        raise UserError(f"{setting} is a damaged gzip file{_after(number)}: {error}.") from error
    except (pyarrow.ArrowException, ValueError, RecursionError, csv.Error) as error:
        # A JSON number of too many digits is a ValueError, too.
        tables_of = {"parquet": "a readable Parquet file", "arrow": "a readable Arrow file"}
        form = tables_of.get(kind, f"valid {kind.upper()}")
        reason = getattr(error, "msg", None) or str(error).splitlines()[0]
        raise UserError(f"{setting} is not {form}{_after(number)}: {reason}.") from error
    except OSError as error:
        form = "is a damaged zstd file" if path.suffix.lower() == ".zst" else "cannot be read"
        raise UserError(f"{setting} {form}{_after(number)}: {error.strerror or error}.") from error


def _after(number: int) -> str:
    return f" after row {number}" if number else ""


def _open_bytes(path: Path) -> IO[bytes]:
    """The decompressed content of a file. Raises `ValueError` where its name is of another kind."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    with path.open("rb") as raw:
        head = raw.read(8)
    if suffix == ".zst":
        if not head:
            raise OSError("it is empty")
        return io.BufferedReader(pyarrow.CompressedInputStream(path.open("rb"), "zstd"))
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it is UTF-16 text and must be UTF-8")
    for magic, real in _MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"by its content it is a {real} file and should be named so")
    return path.open("rb")


def _json_rows(path: Path) -> Numbered:
    """Rows of a JSON file: an array of objects, or one object a line."""
    with _open_bytes(path) as file:
        is_array = file.read(2**16).removeprefix(_BOM).lstrip().startswith(b"[")
    with _open_bytes(path) as file:
        if is_array:
            text = io.TextIOWrapper(file, encoding="utf-8-sig")  # type: ignore[type-var]
            for number, value in enumerate(_elements(text), 1):
                yield number, _mapping(value)
        else:
            yield from _json_lines(file)


def _json_lines(file: IO[bytes]) -> Numbered:
    number, is_first = 0, True
    while line := file.readline(LONGEST_ROW_BYTES):
        number += 1
        if len(line) == LONGEST_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_ROW_BYTES)
            yield number, BadRow(f"a line of more than {LONGEST_ROW_BYTES // 2**20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(_BOM)
        if not line or line.isspace():
            continue
        if is_first and line.strip() == b"{":
            raise ValueError(
                "it is one object over several lines, neither an array of objects nor one object a "
                "line"
            )
        is_first = False
        try:
            yield number, _mapping(json.loads(line.decode()))
        except UnicodeDecodeError as error:
            yield number, BadRow(f"not UTF-8 text ({error})")
        except (ValueError, RecursionError) as error:
            yield number, BadRow(f"not valid JSON ({error})")


def _elements(text: IO[str]) -> Iterator[Any]:
    """The elements of a JSON array, with a piece of it in memory, at least one element. Raises
    `ValueError`; a syntax error is known only after reading as far as an element may reach."""
    decode = json.JSONDecoder().raw_decode
    buffer, at = "", 0

    def more() -> bool:
        nonlocal buffer, at
        # Double the piece: an element of any length is parsed only a few times.
        piece = text.read(max(_PIECE_CHARACTERS, min(len(buffer) - at, _LONGEST_PIECE)))
        if piece:
            buffer, at = buffer[at:] + piece, 0
        return bool(piece)

    def following() -> str:
        """The next character that is not white space, without consuming it; "" at the end."""
        nonlocal at
        while True:
            while at < len(buffer) and buffer[at] in " \t\n\r":
                at += 1
            if at < len(buffer) or not more():
                return buffer[at : at + 1]

    assert following() == "["
    at += 1
    while following() != "]":
        while True:
            try:
                value, end = decode(buffer, at)
            except (ValueError, RecursionError) as error:
                if len(buffer) - at > LONGEST_ROW_BYTES:
                    raise ValueError(
                        f"an element of more than {LONGEST_ROW_BYTES // 2**20} MiB, or a mistake "
                        f"in one ({error})"
                    ) from error
                if not more():
                    raise
                continue
            # A number at the end of the buffer may continue after it.
            if end < len(buffer) or not more():
                break
        at = end
        yield value
        if following() == ",":
            at += 1
            if following() == "]":
                raise ValueError("a comma stands before the end of the array")
        elif following() != "]":
            raise ValueError("the array ends without ']', or a ',' is missing")
    at += 1
    if following():
        raise ValueError("more text follows the array")


def _mapping(row: Any) -> Mapping[str, Any] | BadRow:
    return row if isinstance(row, dict) else BadRow(f"not an object of fields but {type_name(row)}")


def _table_rows(path: Path, delimiter: str) -> Numbered:
    """Rows of a CSV or TSV file with a header, quoted as spreadsheets do."""
    csv.field_size_limit(LONGEST_ROW_BYTES)  # of the whole process; the default is 128 KiB
    with _open_bytes(path) as file:
        # newline="": line breaks within quotes stay as they are.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # type: ignore[type-var]
        lines = _Lines(text)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header = [name.strip() for name in next(reader, [])]
        twice = {name for name in header if header.count(name) > 1}
        if twice or "" in header:
            flaw = f"names {min(twice)!a} twice" if twice - {""} else "has a column without a name"
            raise ValueError(f"its first line, the header, {flaw}")
        while True:
            number = lines.number + 1
            lines.left = LONGEST_ROW_BYTES
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, BadRow(f"not valid CSV ({error})")
                continue
            if len(values) == len(header):
                yield number, dict(zip(header, values, strict=True))
            elif values:
                yield number, BadRow(f"{len(values)} values under a header of {len(header)}")


class _Lines:
    """The lines of a text, with a limit on the characters of a row.

    Attributes:
        number: of the last line read, from 1.
        left: characters that the current row may still take.
    """

    def __init__(self, text: IO[str]) -> None:
        self._text = text
        self.number, self.left = 0, LONGEST_ROW_BYTES

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self.left)
        if not line and self.left:
            raise StopIteration
        self.number += 1
        if len(line) == self.left and not line.endswith("\n"):
            while line and not line.endswith("\n"):
                line = self._text.readline(_PIECE_CHARACTERS)
            raise csv.Error(f"a row of more than {LONGEST_ROW_BYTES // 2**20} MiB")
        self.left -= len(line)
        return line


_READERS: dict[str, Callable[[Path], Numbered]] = {
    "json": _json_rows,
    "csv": lambda path: _table_rows(path, ","),
    "tsv": lambda path: _table_rows(path, "\t"),
    "parquet": tables.parquet_rows,
    "arrow": tables.arrow_rows,
}
