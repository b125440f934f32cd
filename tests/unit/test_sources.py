"""Rows out of files: every container gives the same rows, and streams them."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from neftune_dist.config import SourceConfig, UserError
from neftune_dist.data import builtin
from neftune_dist.data.sources import open_source
from tests.support.row_files import ROWS, array, lines, parquet, read, table, zstd


def arrow(path: Path, rows: list[Any], new: Callable[..., Any]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "array.json": lambda p: p.write_bytes(array(ROWS)),
    "indented.json": lambda p: p.write_text(
        "\n " + json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8"
    ),
    "lines.jsonl": lambda p: p.write_bytes(lines(ROWS)),
    "lines.json": lambda p: p.write_bytes(lines(ROWS)),
    "array.jsonl": lambda p: p.write_bytes(array(ROWS)),
    "windows.jsonl": lambda p: p.write_bytes(lines(ROWS).replace(b"\n", b"\r\n")),
    "no_end.jsonl": lambda p: p.write_bytes(lines(ROWS).rstrip()),
    "bom.json": lambda p: p.write_bytes(b"\xef\xbb\xbf" + array(ROWS)),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + lines(ROWS)),
    "array.json.gz": lambda p: p.write_bytes(gzip.compress(array(ROWS))),
    "lines.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines(ROWS))),
    "bom.jsonl.gz": lambda p: p.write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines(ROWS))),
    "two.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:]))
    ),
    "SHOUTED.JSONL": lambda p: p.write_bytes(lines(ROWS)),
    "dotted.v1.jsonl": lambda p: p.write_bytes(lines(ROWS)),
    "array.json.zst": lambda p: p.write_bytes(zstd(array(ROWS))),
    "lines.jsonl.zst": lambda p: p.write_bytes(zstd(lines(ROWS))),
    "two.jsonl.zst": lambda p: p.write_bytes(zstd(lines(ROWS[:1])) + zstd(lines(ROWS[1:]))),
    "table.parquet": lambda p: parquet(p, ROWS),
    "file.arrow": lambda p: arrow(p, ROWS, pyarrow.ipc.new_file),
    "stream.arrow": lambda p: arrow(p, ROWS, pyarrow.ipc.new_stream),
}


TABLES = {
    "a.csv": table(ROWS, ","),
    "unix.csv": table(ROWS, ",", "\n"),
    "bom.csv": b"\xef\xbb\xbf" + table(ROWS, ","),
    "a.tsv": table(ROWS, "\t"),
    "a.csv.gz": gzip.compress(table(ROWS, ",")),
    "a.tsv.zst": zstd(table(ROWS, "\t")),
    "blank.csv": table(ROWS, ",") + b"\r\n\r\n",
}


def numbered(rows: list[Any], file: str = "") -> list[tuple[str, Any]]:
    return [(f"{file}row {number}", row) for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == numbered(ROWS)


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_text_give_the_same_rows(name: str, tmp_path: Path) -> None:
    """A row's number is that of its first line, behind the header."""
    (tmp_path / name).write_bytes(TABLES[name])
    read_rows = read(tmp_path / name)
    assert [row for _, row in read_rows] == ROWS
    assert [place for place, _ in read_rows] == ["row 2", "row 3", "row 6"]


def test_blank_lines_count_and_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n  \n" + lines(ROWS[:1]) + b"\n\t\n" + lines(ROWS[1:2]) + b"\n")
    assert read(path) == [("row 3", ROWS[0]), ("row 6", ROWS[1])]


def test_a_directory_is_its_files_by_name(tmp_path: Path) -> None:
    parquet(tmp_path / "b.parquet", ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS)))
    (tmp_path / "c.csv").write_bytes(table(ROWS[:1], ","))
    for name in ("README.md", ".hidden.json", "dataset_info.json"):
        (tmp_path / name).write_text("{")
    (tmp_path / "below").mkdir()
    source = open_source(SourceConfig(str(tmp_path)))
    assert list(source.rows) == [
        *numbered(ROWS, "a.jsonl.gz, "),
        *numbered(ROWS, "b.parquet, "),
        ("c.csv, row 2", ROWS[0]),
    ]
    assert source.left_out == ("README.md", "below", "dataset_info.json")


def test_a_glob_is_what_it_matches(tmp_path: Path) -> None:
    for name in ("a/x.jsonl", "b/x.jsonl", "b/y.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(ROWS[:1]))
    assert read(tmp_path / "*" / "*.jsonl") == [
        ("a/x.jsonl, row 1", ROWS[0]),
        ("b/x.jsonl, row 1", ROWS[0]),
    ]
    assert len(read(tmp_path / "**" / "*.json*")) == 3
    assert read(tmp_path / "[b]" / "y*") == [("row 1", ROWS[0])]
    (tmp_path / "[z].jsonl").write_bytes(lines(ROWS))  # a name, before it is a pattern
    assert len(read(tmp_path / "[z].jsonl")) == 3


@pytest.mark.parametrize(
    ("names", "same"),
    [
        (("a.jsonl", "b.jsonl"), True),
        (("a.jsonl", "b.json"), True),
        (("a.csv", "b.tsv"), False),
    ],
)
def test_the_digest_is_of_the_content(names: tuple[str, str], same: bool, tmp_path: Path) -> None:
    """And of how it is read."""
    for name in names:
        (tmp_path / name).write_bytes(lines(ROWS))
    (tmp_path / "c.jsonl").write_bytes(lines(ROWS[::-1]))
    one, two, other = (
        open_source(SourceConfig(str(tmp_path / name))).digest for name in (*names, "c.jsonl")
    )
    assert (one == two) == same and other not in (one, two)


def test_the_builtin_set() -> None:
    source = open_source(SourceConfig("builtin"))
    assert [row for _, row in source.rows] == builtin.rows()


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read("~/rows.jsonl")) == 3


@pytest.mark.parametrize("piece", [1, 2, 7, 50])
def test_an_array_is_the_same_in_pieces_of_any_length(
    piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neftune_dist.data.sources._PIECE_CHARACTERS", piece)
    rows = [*ROWS, {"a": [1, {"b": "]"}], "c": "[,"}, {}]
    (tmp_path / "rows.json").write_text("\n [" + " ,\t".join(map(json.dumps, rows)) + "\n]\n ")
    assert read(tmp_path / "rows.json") == numbered(rows)
    (tmp_path / "numbers.json").write_text("[12345, 6789012]")
    told = [str(row) for _, row in read(tmp_path / "numbers.json")]
    assert told == ["not an object of fields but int"] * 2


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow"])
def test_reading_holds_no_file_in_memory(name: str, tmp_path: Path) -> None:
    rows = [{"instruction": f"{i}" + "x" * 1000, "output": "y" * 1000} for i in range(16_000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif name.endswith("arrow"):
        arrow(path, rows, pyarrow.ipc.new_stream)
    else:
        written = {"json": array, "gz": lines, "csv": lambda r: table(r, ",")}[name.split(".")[-1]]
        content = written(rows)
        path.write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    del rows
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_source(SourceConfig(str(path))).rows) == 16_000
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20  # of 32
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("setting", [{"revision": "main"}, {"split": "test"}])
@pytest.mark.parametrize("local", [True, False])
def test_hub_settings_without_a_hub(setting: dict[str, str], local: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))
    source = SourceConfig(str(path) if local else "builtin", **setting)
    with pytest.raises(UserError, match=r"data\.split and data\.revision have no effect"):
        open_source(source)
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.split and .*have no effect"):
        open_source(source, "data.mixture[1].source")
    with pytest.raises(UserError, match=r"data\.held_out_split and .*have no effect"):
        open_source(source, "data.held_out_source")


def test_a_directory_that_datasets_saved(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [row for _, row in read(tmp_path / "saved")] == ROWS
