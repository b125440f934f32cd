"""Rows out of files: every container gives the same rows, every bad one is named, none crashes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data import builtin
from neftune_dist.data.formats import (
    BadRow,
    Conversation,
    Turn,
    detect_format,
    open_source,
    to_conversation,
)

ROWS: list[dict[str, Any]] = [
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
    {"instruction": "Übersetze 漢字 😀", "input": "a\u2028b\tc", "output": "two\nlines\n"},
    {"instruction": "x", "input": None, "output": "y"},
]


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path, rows: list[Any]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "array.json": lambda p: p.write_bytes(json.dumps(ROWS).encode()),
    "indented.json": lambda p: p.write_text(
        "\n " + json.dumps(ROWS, indent=2, ensure_ascii=False), encoding="utf-8"
    ),
    "lines.jsonl": lambda p: p.write_bytes(lines(ROWS)),
    "lines.json": lambda p: p.write_bytes(lines(ROWS)),
    "array.jsonl": lambda p: p.write_bytes(json.dumps(ROWS).encode()),
    "windows.jsonl": lambda p: p.write_bytes(lines(ROWS).replace(b"\n", b"\r\n")),
    "no_end.jsonl": lambda p: p.write_bytes(lines(ROWS).rstrip()),
    "bom.json": lambda p: p.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
    "bom.jsonl": lambda p: p.write_bytes(b"\xef\xbb\xbf" + lines(ROWS)),
    "array.json.gz": lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "lines.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines(ROWS))),
    "bom.jsonl.gz": lambda p: p.write_bytes(gzip.compress(b"\xef\xbb\xbf" + lines(ROWS))),
    "two.jsonl.gz": lambda p: p.write_bytes(
        gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:]))
    ),
    "SHOUTED.JSONL": lambda p: p.write_bytes(lines(ROWS)),
    "dotted.v1.jsonl": lambda p: p.write_bytes(lines(ROWS)),
    "table.parquet": lambda p: parquet(p, ROWS),
}


def read(path: Path | str) -> list[tuple[int, Mapping[str, Any] | BadRow]]:
    return list(open_source(DataConfig(source=str(path))).rows)


def said(path: Path | str) -> str:
    with pytest.raises(UserError) as raised:
        read(path)
    text = str(raised.value)
    assert "\n" not in text and str(path)[:200] in text, text
    return text


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name) == list(enumerate(ROWS, 1))


def test_blank_lines_count_and_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n  \n" + lines(ROWS[:1]) + b"\n\t\n" + lines(ROWS[1:2]) + b"\n")
    assert read(path) == [(3, ROWS[0]), (6, ROWS[1])]


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    one.write_bytes(lines(ROWS))
    two.write_bytes(lines(ROWS))
    three.write_bytes(lines(ROWS[::-1]))
    digests = [open_source(DataConfig(source=str(path))).digest for path in (one, two, three)]
    assert digests[0] == digests[1] != digests[2]


def test_the_builtin_set() -> None:
    source = open_source(DataConfig())
    assert [row for _, row in source.rows] == builtin.rows()


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(read("~/rows.jsonl")) == 3


# Sources that cannot be read.


@pytest.mark.parametrize(
    "name",
    [
        "/nowhere/rows.jsonl",
        "nowhere/rows.json.gz",
        "./rows",
        "~/no such file.parquet",
        "~nosuchuser/rows.json",
        "/" + "a" * 5000,
    ],
)
def test_a_missing_file(name: str) -> None:
    with pytest.raises(UserError, match=r"data\.source=.* does not exist"):
        read(name)


def test_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in said(tmp_path)
    (tmp_path / "folder.json").mkdir()
    assert "is a directory" in said(tmp_path / "folder.json")


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet.gz", "rows", "rows.json.bz2"])
def test_a_suffix_that_is_not_known(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(lines(ROWS))
    assert ".parquet" in said(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("cut.json", json.dumps(ROWS).encode()[:-9], "not valid JSON"),
        ("comma.json", b'[{"a": 1},]', "not valid JSON"),
        ("deep.json", b"[" * 100_000, "not valid JSON"),
        ("digits.json", b"[" + b"1" * 5000 + b"]", "not valid JSON"),
        ("latin.jsonl", '{"instruction": "é"}'.encode("latin-1"), "not UTF-8"),
        ("latin.json", '["é"]'.encode("latin-1"), "not UTF-8"),
        ("utf16.json", json.dumps(ROWS).encode("utf-16"), "not UTF-8"),
        ("zipped.json", gzip.compress(lines(ROWS)), "not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(lines(ROWS * 500))[:-20], "damaged gzip"),
        ("flipped.json.gz", gzip.compress(lines(ROWS))[:-6] + b"x" * 6, "damaged gzip"),
        ("plain.jsonl.gz", lines(ROWS), "damaged gzip"),
        ("empty.json.gz", b"\x1f\x8b", "damaged gzip"),
        ("text.parquet", lines(ROWS), "not a readable Parquet"),
        ("empty.parquet", b"", "not a readable Parquet"),
    ],
)
def test_a_damaged_file(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert reason in said(tmp_path / name)


def test_damage_behind_good_rows(tmp_path: Path) -> None:
    """What was read before the damage must not pass for the whole."""
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(
        gzip.compress(lines([{"n": i, "text": "x" * 97} for i in range(50_000)]))[:-40]
    )
    rows = open_source(DataConfig(source=str(path))).rows
    assert next(rows)[0] == 1
    with pytest.raises(UserError, match="damaged gzip"):
        list(rows)


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.parquet"
    text = pyarrow.array([b"\xe9\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": ["b"]}), path)
    assert "not a readable Parquet" in said(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who reads everything
    assert "Permission denied" in said(path)


@pytest.mark.parametrize("name", ["no-one/no-data", "nodata"])
def test_a_hub_that_cannot_be_reached(name: str) -> None:
    text = said(name)
    assert "no local file" in text and "hub" in text


@pytest.mark.parametrize("name", ["a b", "a/b/c", "http://host/rows", "a//b"])
def test_neither_a_file_nor_a_hub_id(name: str) -> None:
    assert "neither a file nor a hub id" in said(name)


@pytest.mark.parametrize("setting", [{"revision": "main"}, {"split": "test"}])
@pytest.mark.parametrize("local", [True, False])
def test_hub_settings_without_a_hub(setting: dict[str, str], local: bool, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))
    source = str(path) if local else "builtin"
    with pytest.raises(UserError, match=r"data\.split and data\.revision have no effect"):
        open_source(DataConfig(source=source, **setting))


# Rows that cannot be used.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"[1, 2]", "not an object of fields but list"),
        (b"null", "not an object of fields but null"),
        (b'"text"', "not an object of fields but str"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"1" * 5000, "not valid JSON"),
        (b'{"a": 1} {"b": 2}', "not valid JSON"),
    ],
)
def test_one_bad_line_among_good_ones(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:1]) + line + b"\n" + lines(ROWS[1:]))
    (_, first), (number, bad), *rest = read(path)
    assert first == ROWS[0] and rest == [(3, ROWS[1]), (4, ROWS[2])]
    assert number == 2 and isinstance(bad, BadRow) and reason in str(bad)


def test_one_bad_element_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0], None, 5, ROWS[1]]))
    kinds = [(number, isinstance(row, BadRow)) for number, row in read(path)]
    assert kinds == [(1, False), (2, True), (3, True), (4, False)]


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": 5, "output": "b"}, "'instruction' is not text but int"),
        ({"instruction": "a", "output": None}, "'output' is not text but null"),
        ({"instruction": "a", "output": ["b"]}, "'output' is not text but list"),
        ({"instruction": "a", "input": 7, "output": "b"}, "'input' is not text but int"),
        ({"instruction": "a", "output": ""}, "the answer is empty"),
        ({"instruction": "a", "output": " \n"}, "the answer is empty"),
        ({"instruction": "\ud800", "output": "b"}, "'instruction' holds a lone surrogate"),
        ({"prompt": "a", "completion": "\udfff"}, "'completion' holds a lone surrogate"),
        ({"prompt": b"a", "completion": "b"}, "'prompt' is not text but bytes"),
        ({"messages": None}, "'messages' is missing or not a list"),
        ({"messages": []}, "'messages' is missing or not a list"),
        ({"messages": "hello"}, "'messages' is missing or not a list"),
        ({"messages": ["hello"]}, "turn 1 is not an object"),
        ({"messages": [{"role": "user"}]}, "turn 1: field 'content' is missing"),
        ({"messages": [{"content": "a"}]}, "turn 1: field 'role' is missing"),
        (turns(("user", "a"), ("assistant", None)), "turn 2: field 'content' is not text but null"),
        (turns(("user", "a"), ("bot", "b")), "turn 2 has the role 'bot'; known: system, user"),
        (turns(("user", "a"), (["assistant"], "b")), "turn 2: field 'role' is not text but list"),
        (turns(("user", "a"), ("user", "b")), "the answer is empty"),
        (turns(("user", "a"), ("assistant", " ")), "the answer is empty"),
        (turns(("assistant", "a"), ("user", "b")), "the first turn is the assistant's"),
        (turns(("user", "a"), ("assistant", "\udc80")), "turn 2: field 'content' holds a lone"),
    ],
)
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        to_conversation(row, detect_format(row))
    assert reason in str(raised.value)
    str(raised.value).encode()  # can be printed, whatever the row held


@pytest.mark.parametrize(
    ("row", "format_name", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "alpaca", "'instruction' is missing"),
        ({"instruction": "a"}, "alpaca", "'output' is missing"),
        ({"instruction": "a", "output": "b"}, "prompt_completion", "'prompt' is missing"),
        ({"instruction": "a", "output": "b"}, "messages", "'messages' is missing"),
    ],
)
def test_a_row_of_another_format(row: dict[str, Any], format_name: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_conversation(row, format_name)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "a"},
        {"instruction": "a"},
        {"completion": "b"},
        {"\ud800": 1},
        {f"field {i}": 1 for i in range(1000)},
    ],
)
def test_fields_of_no_known_format(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="no known format") as raised:
        detect_format(row)
    assert len(str(raised.value).encode()) < 250


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"instruction": "a", "input": "", "output": "b"},
            Conversation((Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            {"instruction": "a", "input": "c", "output": "b", "task": "t"},
            Conversation((Turn("user", "a"), Turn("assistant", "b")), "c", (("task", "t"),)),
        ),
        (
            {"instruction": "a", "output": "b", "category": "q"},
            Conversation((Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            {"prompt": "a", "completion": "b", "input": "not of this format"},
            Conversation((Turn("user", "a"), Turn("assistant", "b"))),
        ),
        (
            turns(
                ("system", "s"), ("user", "a"), ("assistant", ""), ("user", ""), ("assistant", "b")
            ),
            Conversation(
                (
                    Turn("system", "s"),
                    Turn("user", "a"),
                    Turn("assistant", ""),
                    Turn("user", ""),
                    Turn("assistant", "b"),
                )
            ),
        ),
    ],
)
def test_the_three_formats(row: dict[str, Any], expected: Conversation) -> None:
    assert to_conversation(row, detect_format(row)) == expected


def test_an_input_follows_its_instruction() -> None:
    conversation = to_conversation({"instruction": "a", "input": "c", "output": "b"}, "alpaca")
    assert conversation.messages() == [
        {"role": "user", "content": "a\n\nc"},
        {"role": "assistant", "content": "b"},
    ]
    assert conversation.opening() == conversation.messages()[:1]


def test_messages_out_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    row = turns(("user", "a"), ("assistant", "b"))
    parquet(path, [row, row, row])
    for _, read_row in read(path):
        assert isinstance(read_row, dict)
        assert to_conversation(read_row, "messages") == to_conversation(row, "messages")
