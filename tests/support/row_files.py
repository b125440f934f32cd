"""Rows, and files of every kind that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from neftune_dist.config import SourceConfig
from neftune_dist.data.errors import BadRow
from neftune_dist.data.sources import open_source

ROWS: list[dict[str, Any]] = [
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
    {"instruction": "Übersetze 漢字 😀", "input": "a\u2028b\tc", "output": "two\nlines\n"},
    {"instruction": 'q"uo,te', "input": " x ", "output": "y\r\nz"},
]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array(rows: list[Any]) -> bytes:
    return json.dumps(rows).encode()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def parquet(path: Path, rows: list[Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


def table(rows: list[Any], delimiter: str, end: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def read(path: Path | str) -> list[tuple[str, Mapping[str, Any] | BadRow]]:
    return list(open_source(SourceConfig(str(path))).rows)


def said(*pairs: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": who, "value": what} for who, what in pairs], **more}


def turns(*pairs: tuple[Any, Any], field: str = "messages", **more: Any) -> dict[str, Any]:
    return {field: [{"role": role, "content": content} for role, content in pairs], **more}
