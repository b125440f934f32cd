"""Data made to use up the machine, or damaged so that reading it would end the process: each ends
in one sentence, or is a counted bad row, and takes no more memory than a row may have."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from neftune_dist.config import SourceConfig, UserError
from neftune_dist.data import errors, sources, tables, text_files
from neftune_dist.data.errors import BadRow

pytestmark = pytest.mark.timeout(120)
LIMIT = 2**16


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small files exceed them."""
    for module in (errors, tables, text_files):
        monkeypatch.setattr(module, "LONGEST_ROW_BYTES", LIMIT)
    monkeypatch.setattr(tables, "_BATCH_BYTES", LIMIT)
    monkeypatch.setattr(text_files, "_PIECE_CHARACTERS", 2**12)


def rows(path: Path) -> list[Any]:
    return [row for _, row in sources.open_source(SourceConfig(source=str(path))).rows]


class Watched:
    """A text whose reader may not hold more than some characters of it."""

    def __init__(self, content: Iterator[str]) -> None:
        self.content, self.num_read = content, 0

    def read(self, size: int) -> str:
        self.num_read += size
        return next(self.content)[:size]


def test_an_element_of_a_json_array_without_end_is_refused() -> None:
    endless = Watched(iter(["[", '{"text": "', *["a" * 2**12] * 10**6]))
    with pytest.raises(ValueError, match="an element of more than 0 MiB, or a mistake in one"):
        list(text_files._elements(endless))  # type: ignore[arg-type]
    assert endless.num_read < 10 * LIMIT


def test_long_and_short_rows_of_csv(tmp_path: Path) -> None:
    """A line, a quoted field and many fields; what follows is read."""
    lines = ["text,n", "a,1", "x" * 2 * LIMIT, "b,2", '"' + "y\n" * LIMIT + '",3', "c,4", ""]
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    found = rows(tmp_path / "a.csv.gz")
    assert [row["text"] for row in found if isinstance(row, dict)] == ["a", "b"]
    told = [str(row) for row in found if isinstance(row, BadRow)]
    assert told[0] == told[1] == "not valid CSV (a row of more than 0 MiB)"


def test_a_header_without_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("x" * 2 * LIMIT + "\nb\n")
    with pytest.raises(UserError, match="is not valid TSV: a row of more than 0 MiB"):
        rows(tmp_path / "a.tsv")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_nesting_without_end_is_no_row(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a.{suffix}").write_text('{"text": ' + "[" * 60_000 + "\n" + '{"text": "a"}\n')
    bad, good = rows(tmp_path / f"a.{suffix}")
    assert isinstance(bad, BadRow) and good == {"text": "a"}
    (tmp_path / f"a.{suffix}").write_text("[" * 60_000)
    with pytest.raises(UserError, match="is not valid JSON: it is nested too deeply"):
        rows(tmp_path / f"a.{suffix}")


def write_arrow(table: pyarrow.Table, path: Path, rows: int = 20) -> None:
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as made:
        made.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_is_read_by_pieces_of_bounded_size(suffix: str, tmp_path: Path) -> None:
    lengths = [10, LIMIT // 4, 2 * LIMIT] + [100] * 50 + [LIMIT // 2] * 20
    table = pyarrow.table({"text": ["a" * length for length in lengths]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=20, use_dictionary=False)
    else:
        write_arrow(table, path)
    found = rows(path)
    assert [len(row["text"]) for row in found if isinstance(row, dict)] == [
        length for length in lengths if length < LIMIT
    ]
    assert [str(row) for row in found if isinstance(row, BadRow)] == ["a row of more than 0 MiB"]


READ_GREEDY = """
import sys
from neftune_dist.config import SourceConfig, UserError
from neftune_dist.data import sources, tables
tables._BATCH_GIB = 0.2
tables._BATCH_BYTES = tables.LONGEST_ROW_BYTES = 2**26
try:
    sum(1 for _ in sources.open_source(SourceConfig(source=sys.argv[1])).rows)
except UserError as error:
    print(error)
"""


def test_values_that_stand_for_any_amount_are_refused(tmp_path: Path) -> None:
    """A dictionary of one long value, named by all rows: little on disk, much in memory. In a
    process that has no freed memory to take again, which the limit does not count."""
    said = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1000), ["a" * 2**20])
    table, path = pyarrow.table({"text": said}), tmp_path / "a.arrow"
    write_arrow(table, path, rows=1000)
    assert path.stat().st_size < 2**22
    command = [sys.executable, "-c", READ_GREEDY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert "reading some rows of it takes more than" in done.stdout, (done.stdout, done.stderr)


FUZZ = """
import os, random, sys
from pathlib import Path
from neftune_dist.config import SourceConfig, UserError
from neftune_dist.data import sources
good, folder = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2])
randoms = random.Random(0)
for k in range(60):
    content = bytearray(good)
    for _ in range(randoms.choice([1, 2, 5, 20])):
        content[randoms.randrange(len(content))] = randoms.choice([0, 255, randoms.randrange(256)])
    path = folder / f"damaged{Path(sys.argv[1]).suffix}"
    path.write_bytes(content)
    try:
        sum(1 for _ in sources.open_source(SourceConfig(source=str(path))).rows)
    except UserError:
        pass
print("read")
"""


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_no_damage_to_a_table_ends_the_process(suffix: str, tmp_path: Path) -> None:
    made = [
        {"text": "a" * i, "turns": [{"role": "user", "n": i}], "d": "abc"[i % 3]} for i in range(60)
    ]
    table, path = pyarrow.Table.from_pylist(made), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        write_arrow(table, path)
    command = [sys.executable, "-c", FUZZ, str(path), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout == "read\n", (done.returncode, done.stderr)
