"""Rows of text files: JSON arrays and lines, CSV and TSV, compressed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow

from neftune_dist.data.errors import (
    JSON,
    LONGEST_ROW_BYTES,
    BadRow,
    Numbered,
    parse_json,
    type_name,
)

_PIECE_CHARACTERS = 2**20  # of a JSON array, read at a time; more in a long element
_LONGEST_PIECE = 2**24
_BOM = b"\xef\xbb\xbf"
_MAGIC = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_QUOTED = r'(?:"(?:[^"]|"")*+"|[^"\t\r\n]*+)'
_QUOTED_ROW = re.compile(rf"{_QUOTED}(?:\t{_QUOTED})*+")


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


def json_rows(path: Path) -> Numbered:
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
        line = line.removeprefix(_BOM)  # joined files have several
        if not line or line.isspace():
            continue
        if is_first and line.strip() == b"{":
            raise ValueError(
                "it is one object over several lines, neither an array of objects nor one object a "
                "line: write the list of its rows alone"
            )
        is_first = False
        try:
            yield number, _mapping(parse_json(line.decode()))
        except UnicodeDecodeError as error:
            yield number, BadRow(f"not UTF-8 text ({error})")
        except BadRow as error:
            yield number, error


def _elements(text: IO[str]) -> Iterator[Any]:
    """The elements of a JSON array, a `BadRow` for one with a key twice. Holds a piece of the text,
    at least one element. Raises `ValueError`; a syntax error is known only after reading as far as
    an element may reach."""
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
                value, end = _decode(buffer, at)
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            except ValueError as error:
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


def _decode(text: str, at: int) -> tuple[Any, int]:
    try:
        return JSON.raw_decode(text, at)
    except BadRow as error:  # where the element ends, a decoder says that takes the key twice
        return error, json.JSONDecoder().raw_decode(text, at)[1]


def _mapping(row: Any) -> Mapping[str, Any] | BadRow:
    if isinstance(row, (dict, BadRow)):
        return row
    return BadRow(f"not an object of fields but {type_name(row)}")


def table_rows(path: Path, delimiter: str) -> Numbered:
    """Rows of a CSV or TSV file with a header: a CSV quoted as spreadsheets do, a TSV only where
    all its quotation marks are of that kind, as pandas and spreadsheets write them."""
    csv.field_size_limit(LONGEST_ROW_BYTES)  # of the whole process; the default is 128 KiB
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
    if delimiter == "\t":
        with _open_bytes(path) as file:
            quoting = csv.QUOTE_MINIMAL if _is_quoted(_Lines(file)) else csv.QUOTE_NONE
    with _open_bytes(path) as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
        header = [name.strip() for name in next(reader, [])]
        if len(header) == 1 and (other := re.search("[,;\t|]", header[0])):
            raise ValueError(f"its first line, the header, is separated by {other[0]!a}")
        if header[1:] and not header[0]:
            header[0] = "Unnamed: 0"  # the numbers of rows that pandas writes, as it reads them
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


def _is_quoted(lines: _Lines) -> bool:
    """Whether every quotation mark quotes a field, or stands doubled in a quoted one."""
    row, is_open = [], False
    try:
        for line in lines:
            row.append(line)
            is_open ^= line.count('"') % 2 == 1
            if not is_open:
                if not _QUOTED_ROW.fullmatch("".join(row).rstrip("\r\n")):
                    return False
                row, lines.left = [], LONGEST_ROW_BYTES
    except csv.Error:  # a row that is too long
        return False
    return not is_open


class _Lines:
    """The lines of a table, with a limit on the characters of a row.

    Attributes:
        number: of the last line read, from 1.
        left: characters that the current row may still take.
    """

    def __init__(self, file: IO[bytes]) -> None:
        # newline="": line breaks within quotes stay as they are.
        self._text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")  # type: ignore[type-var]
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
