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
    "boms.jsonl": lambda p: p.write_bytes(  # of files that were joined
        b"".join(b"\xef\xbb\xbf" + line for line in lines(ROWS).splitlines(keepends=True))
    ),
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
    """A row's number is that of its first line, after the header."""
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
    monkeypatch.setattr("neftune_dist.data.text_files._PIECE_CHARACTERS", piece)
    rows = [*ROWS, {"a": [1, {"b": "]"}], "c": "[,"}, {}]
    (tmp_path / "rows.json").write_text("\n [" + " ,\t".join(map(json.dumps, rows)) + "\n]\n ")
    assert read(tmp_path / "rows.json") == numbered(rows)
    (tmp_path / "numbers.json").write_text("[12345, 6789012]")
    told = [str(row) for _, row in read(tmp_path / "numbers.json")]
    assert told == ["not an object of fields but int"] * 2


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.csv", "a.parquet", "a.arrow"])
def test_reading_holds_no_file_in_memory(name: str, tmp_path: Path) -> None:
    rows = [{"instruction": f"{i}" + "x" * 1000, "output": "y" * 1000} for i in range(10_000)]
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
        assert sum(1 for _ in open_source(SourceConfig(str(path))).rows) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 12 * 2**20  # of 20
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


# What `datasets` and the hub leave on disk.


def test_saved_dataset_is_what_its_state_lists(tmp_path: Path) -> None:
    """And not the caches that a later `map` puts beside it."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    mapped = datasets.load_from_disk(tmp_path / "saved").map(lambda row: {"output": "mapped"})
    assert len(mapped) == 3 and list((tmp_path / "saved").glob("cache-*.arrow"))
    assert [row for _, row in read(tmp_path / "saved")] == ROWS
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"state\.json lists '.*/data-00001-of-00002.arrow', which"):
        read(tmp_path / "saved")


def test_saved_dataset_lists_no_file_elsewhere(tmp_path: Path) -> None:
    for name in ("one", "other"):
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "dict" / name)
    state = tmp_path / "dict" / "one" / "state.json"
    listed = {"_data_files": [{"filename": "../other/data-00000-of-00001.arrow"}]}
    state.write_text(json.dumps(json.loads(state.read_text()) | listed))
    with pytest.raises(
        UserError, match=r"one/state\.json lists '.*other.*', which is no file in it"
    ):
        read(tmp_path / "dict" / "one")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["../dict/other"]}')
    with pytest.raises(UserError, match="is not a dataset that `datasets` saved"):
        open_source(SourceConfig(str(tmp_path / "saved"), split="../dict/other"))


def test_dataset_dict_is_its_training_split(tmp_path: Path) -> None:
    parts = {"train": ROWS[:2], "test": ROWS[2:]}
    saved = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    source = open_source(SourceConfig(str(tmp_path / "saved")))
    assert [row for _, row in source.rows] == ROWS[:2]
    assert source.left_out == ("test (split)",)
    source = open_source(SourceConfig(str(tmp_path / "saved"), split="test"))
    assert [row for _, row in source.rows] == ROWS[2:]
    with pytest.raises(UserError, match=r"no split 'dev'; there are train, test: choose one by d"):
        open_source(SourceConfig(str(tmp_path / "saved"), split="dev"))


def test_a_link_to_nothing_is_no_file_to_leave_out(tmp_path: Path) -> None:
    """As in the hub's cache, where a download was lost."""
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "blob")
    with pytest.raises(UserError, match=r"b\.jsonl cannot be read: No such file or directory"):
        read(tmp_path)


HUB_FOLDERS: dict[str, tuple[dict[str, list[str]], str]] = {
    # Files by split, and files of no split.
    "plain": ({"train": ["train.jsonl"], "test": ["test.jsonl"], "": ["README.md"]}, "train"),
    "pushed": (
        {
            "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
            "validation": ["data/validation-00000-of-00001.jsonl"],
        },
        "train",
    ),
    "own names": (
        {
            "train_sft": ["data/train_sft-00000-of-00001-abc.jsonl"],
            "train_gen": ["data/train_gen-00000-of-00001-abc.jsonl"],
        },
        "train_sft",
    ),
    "folders": ({"train": ["train/a.jsonl", "train/test.jsonl"], "test": ["dev/a.jsonl"]}, "train"),
    "other words": ({"train": ["my-Training.jsonl"], "validation": ["val_1.jsonl"]}, "validation"),
    "words inside words": ({"": ["trainer.jsonl", "contest.jsonl"]}, "train"),
    "no split, in data": ({"": ["data/a.jsonl", "data/b.jsonl"]}, "train"),
}


@pytest.mark.parametrize("name", HUB_FOLDERS)
def test_folder_as_on_the_hub_is_one_split(name: str, tmp_path: Path) -> None:
    files, split = HUB_FOLDERS[name]
    every = {file for names in files.values() for file in names}
    for file in every:
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_bytes(lines([{"text": file}]))
    source = open_source(SourceConfig(str(tmp_path), split=split))
    chosen = files.get(split) or files[""]
    assert sorted(row["text"] for _, row in source.rows if isinstance(row, dict)) == sorted(chosen)
    assert {*source.left_out} == every - {*chosen}


CARDS = {
    # The head of a README.md, and what is read of a.jsonl, b.jsonl and x/c.jsonl, by split.
    "by split": (
        "configs:\n- config_name: default\n  data_files:\n  - {split: train, path: x/*.jsonl}\n"
        "  - split: test\n    path:\n    - a.jsonl\n    - b.jsonl",
        {"train": ["x/c.jsonl"], "test": ["a.jsonl", "b.jsonl"]},
    ),
    "one pattern": (
        "configs:\n- config_name: en\n  data_files: '[ab].jsonl'",
        {"train": ["a.jsonl", "b.jsonl"]},
    ),
    "default of two": (
        "configs:\n- config_name: en\n  data_files: a.jsonl\n"
        "- {config_name: de, default: true, data_dir: x, data_files: c.jsonl}",
        {"train": ["x/c.jsonl"]},
    ),
    "folder": ("configs:\n- {config_name: en, data_dir: x}", {"train": ["x/c.jsonl"]}),
    "no configs": ("license: mit", {"train": ["a.jsonl", "b.jsonl"]}),
}


def card(folder: Path, head: str) -> None:
    (folder / "x").mkdir()
    for name in ("a.jsonl", "b.jsonl", "x/c.jsonl"):
        (folder / name).write_bytes(lines([{"text": name}]))
    (folder / "README.md").write_text(f"---\n{head}\n---\n# Rows\n")


@pytest.mark.parametrize("name", CARDS)
def test_folder_by_the_configs_of_its_readme(name: str, tmp_path: Path) -> None:
    head, splits = CARDS[name]
    card(tmp_path, head)
    for split, files in splits.items():
        rows = open_source(SourceConfig(str(tmp_path), split=split)).rows
        assert [row["text"] for _, row in rows if isinstance(row, dict)] == files


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (
            "configs:\n- {config_name: en, data_files: a.jsonl}\n"
            "- {config_name: de, data_files: b.jsonl}",
            "has the configurations en, de, none of them the default: name the files of one",
        ),
        (
            "configs:\n- config_name: a\n  data_files: [{split: test, path: a.jsonl}]",
            "has no split 'train'; there are test: choose one by data.split",
        ),
        ("configs:\n- {config_name: a, data_files: no.jsonl}", "names no.jsonl, which matches no"),
        ("configs:\n- {config_name: a, data_files: ../a.jsonl}", "outside of the directory"),
        ("configs:\n- {config_name: a, data_files: /a.jsonl}", "outside of the directory"),
        ("configs:\n- {config_name: a, data_dir: ..}", "which is no folder in the directory"),
        ("configs:\n- {config_name: a, data_dir: none}", "which is no folder in the directory"),
        (f"configs:\n- {{config_name: a, data_dir: {'a' * 300}}}", "'configs' that cannot be read"),
        ("configs: [", r"has 'configs' that cannot be read \(ParserError: while parsing"),
        ("configs: 5", "has 'configs' that cannot be read"),
        ('configs:\n- {config_name: a, data_dir: "\\0"}', "has 'configs' that cannot be read"),
        ("configs:\n- {config_name: a, data_files: [{split: train}]}", "cannot be read"),
    ],
)
def test_readme_that_chooses_nothing_is_refused(head: str, reason: str, tmp_path: Path) -> None:
    card(tmp_path, head)
    with pytest.raises(UserError, match=reason):
        open_source(SourceConfig(str(tmp_path)))


def test_columns_that_a_saved_format_hides_are_no_columns(tmp_path: Path) -> None:
    stored = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "input": "c"}])
    stored.set_format(columns=["prompt", "completion"])
    stored.save_to_disk(tmp_path)
    assert read(tmp_path) == [("row 1", {"prompt": "a", "completion": "b", "input": None})]
    state = json.loads((tmp_path / "state.json").read_text())
    del state["_output_all_columns"]
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert read(tmp_path) == [("row 1", {"prompt": "a", "completion": "b", "input": None})]
    (tmp_path / "state.json").write_text(json.dumps(state | {"_format_columns": [1]}))
    with pytest.raises(UserError, match=r"state\.json is damaged: \[0\] is a whole number"):
        read(tmp_path)


def test_folder_without_a_training_split_names_the_others(tmp_path: Path) -> None:
    for name in ("test.jsonl", "validation.jsonl"):
        (tmp_path / name).write_bytes(lines(ROWS))
    for key, setting in (("data.source", "split"), ("data.held_out_source", "held_out_split")):
        with pytest.raises(UserError, match=rf"no split 'train'; .*test, val.* by data\.{setting}"):
            open_source(SourceConfig(str(tmp_path)), key)
    assert len(list(open_source(SourceConfig(str(tmp_path), split="dev")).rows)) == 3


def test_struct_lacks_the_keys_that_are_null(tmp_path: Path) -> None:
    """Arrow gives every struct of a column the keys of all. A list keeps its nulls."""
    rows = [
        {
            "tools": [{"name": "f", "parameters": {"a": {"type": "string"}}}],
            "n": [1, None],
            "m": {},
        },
        {
            "tools": [{"name": "g", "parameters": {"b": {"type": "integer"}}}, {}],
            "n": None,
            "m": {"c": 1},
        },
        {"tools": None, "n": [], "m": None},
        {"tools": [], "n": [None, 3], "m": {"c": 2}},
    ]
    parquet(tmp_path / "a.parquet", rows)
    arrow(tmp_path / "a.arrow", rows, pyarrow.ipc.new_stream)
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    for kind in ("parquet", "arrow", "jsonl"):
        assert [row for _, row in read(tmp_path / f"a.{kind}")] == rows
    null = {"arguments": {"a": None}}
    (tmp_path / "null.jsonl").write_bytes(lines([null]))
    assert read(tmp_path / "null.jsonl") == [("row 1", null)]


def test_nested_columns_of_every_kind(tmp_path: Path) -> None:
    """Slices of them, too: a row group is converted some rows at a time."""
    numbers = [[i, None] if i % 3 else None for i in range(2500)]
    types = {
        "list": pyarrow.list_(pyarrow.int64()),
        "large": pyarrow.large_list(pyarrow.int64()),
        "fixed": pyarrow.list_(pyarrow.int64(), 2),
    }
    columns = {name: pyarrow.array(numbers, kind) for name, kind in types.items()}
    maps = [[("a", i), ("b", None)] if i % 2 else None for i in range(2500)]
    columns["map"] = pyarrow.array(maps, pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for kind in ("parquet", "arrow"):
        for i, (_, row) in enumerate(read(tmp_path / f"a.{kind}")):
            expected = {**dict.fromkeys(types, numbers[i]), "map": maps[i] and dict(maps[i])}
            assert row == expected


def test_columns_encoded_by_value_are_what_they_encode(tmp_path: Path) -> None:
    """Slices of them, too, and where they hold times, which are not read."""
    expected = ["a"] * 700 + [None] + ["b"] * 1799
    texts = pyarrow.array(["a", None, "b"])
    times = pyarrow.array([2**62, None, 1], pyarrow.timestamp("us"))
    ends = pyarrow.array([700, 701, 2500], pyarrow.int32())
    places = pyarrow.array([0] * 700 + [1] + [2] * 1799)
    columns = {}
    for name, values in (("text", texts), ("when", times)):
        columns[name] = pyarrow.DictionaryArray.from_arrays(places, values)
    columns["run_text"] = pyarrow.RunEndEncodedArray.from_arrays(ends, texts)
    table = pyarrow.table(columns)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert [row for _, row in read(tmp_path / "a.arrow")] == [
        {"text": text, "when": None, "run_text": text} for text in expected
    ]


def test_column_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    kinds, texts = pyarrow.array([0], pyarrow.int8()), pyarrow.array(["a"])
    times = [pyarrow.array([2**62], pyarrow.timestamp("us"))]
    union = pyarrow.UnionArray.from_dense(kinds, pyarrow.array([0], pyarrow.int32()), times)
    twice = [[("a", 1), ("a", 2)]]
    columns = {"u": union, "m": pyarrow.array(twice, pyarrow.map_(pyarrow.string(), "int64"))}
    reasons = {"u": "its column 'u' cannot be read", "m": "it has two columns of the name 'a'"}
    for name, reason in reasons.items():
        table = pyarrow.table({"text": texts, name: columns[name]})
        with pyarrow.ipc.new_file(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        with pytest.raises(UserError, match=reason):
            read(tmp_path / f"{name}.arrow")


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_pointer_of_git_lfs_is_called_one(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=f"{name} is a pointer of Git LFS, not the file"):
        open_source(SourceConfig(str(tmp_path / name)))


def test_column_of_row_numbers_that_pandas_writes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt,completion\n0,a,b\n")
    assert read(tmp_path / "a.csv") == [
        ("row 2", {"Unnamed: 0": "0", "prompt": "a", "completion": "b"})
    ]


def test_json_features_are_objects(tmp_path: Path) -> None:
    """As `datasets` reads what it wrote."""
    mixed = [{"a": [1, {"b": None}]}, "text", None, 5]
    rows = [{"text": "a", "list": mixed, "value": value} for value in mixed]
    features = datasets.Features(
        text=datasets.Value("string"), list=datasets.List(datasets.Json()), value=datasets.Json()
    )
    stored = datasets.Dataset.from_list(rows, features=features)
    stored.to_parquet(tmp_path / "a.parquet")
    stored.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        assert [row for _, row in read(tmp_path / name)] == list(stored) == rows


def test_times_are_not_read(tmp_path: Path) -> None:
    """Python's dates cannot hold all of Arrow's, nor can every system its time zones."""
    times = {
        "far": pyarrow.array([2**62], pyarrow.timestamp("ms")),
        "nowhere": pyarrow.array([1], pyarrow.timestamp("ns", tz="No/Where")),
        "day": pyarrow.array([10**9], pyarrow.int32()).cast(pyarrow.date32()),
        "month": pyarrow.array([(1, 2, 3)], pyarrow.month_day_nano_interval()),
        "long": pyarrow.array([2**62], pyarrow.duration("s")),
    }
    turn = pyarrow.StructArray.from_arrays([times["far"], ["a"]], ["at", "content"])
    times["turn"] = turn
    table = pyarrow.table({"output": ["b"], **times})
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    pyarrow.parquet.write_table(table.drop(["month", "long"]), tmp_path / "a.parquet")
    for name, names in (("a.arrow", times), ("a.parquet", table.column_names[1:4])):
        [(_, row)] = read(tmp_path / name)
        expected = {"output": "b", **dict.fromkeys(names), "turn": {"content": "a"}}
        assert row == expected


def test_tsv_is_quoted_where_all_its_quotes_are(tmp_path: Path) -> None:
    quoted = b'prompt\tcompletion\n"say ""hi"""\t"a\tb\nc"\nx\ty\n'
    raw = b'prompt\tcompletion\n"so" he said\t5" wide\n"whole"\t"\n'
    (tmp_path / "quoted.tsv").write_bytes(quoted)
    (tmp_path / "raw.tsv").write_bytes(raw)
    assert read(tmp_path / "quoted.tsv") == [
        ("row 2", {"prompt": 'say "hi"', "completion": "a\tb\nc"}),
        ("row 4", {"prompt": "x", "completion": "y"}),
    ]
    assert read(tmp_path / "raw.tsv") == [
        ("row 2", {"prompt": '"so" he said', "completion": '5" wide'}),
        ("row 3", {"prompt": '"whole"', "completion": '"'}),
    ]


def test_keys_are_stripped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{" instruction": "a", "output\t": "b"}]))
    parquet(tmp_path / "a.parquet", [{" instruction": "a", "output\t": "b"}])
    for name in ("a.jsonl", "a.parquet"):
        assert read(tmp_path / name) == [("row 1", {"instruction": "a", "output": "b"})]
