"""Many rows, by several processes: the entry of one process, byte for byte, also after a kill."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from neftune_dist.config import DataConfig, SourceConfig, UserError
from neftune_dist.data import shards as pool
from neftune_dist.data.dataset import prepare
from neftune_dist.data.documents import DocumentWriter
from neftune_dist.data.shards import Shard, ShardMaker
from tests.support.corpora import entries, numbered

DEADLINE_SECONDS = 120


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes begin after 40 rows, and a shard has 20."""
    monkeypatch.setattr(pool, "_ALONE_ROWS", 40)
    monkeypatch.setattr(pool, "_SHARD_ROWS", 20)


def rows_of_all_kinds() -> list[dict[str, Any]]:
    """Good rows, bad ones before and after the first good one, long ones, copies."""
    bad = {"instruction": "no answer"}
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    long = {"instruction": "Count.", "output": "1 " * 400}
    rows = [bad, *numbered(130), talk, long, bad, *numbered(30), talk, bad, long, talk]
    return [dict(row, extra="left out") if i == 150 else row for i, row in enumerate(rows)]


def mixture(write: Callable[..., DataConfig], folder: str, **data: Any) -> DataConfig:
    """Two sources; the second one has one text in other columns."""
    one = write(rows_of_all_kinds(), "one.jsonl").source
    two = write([{"q": f"{i}?", "a": f"{i}.", "s": "Say."} for i in range(70)], "two.jsonl").source
    columns = {"prompt": "q", "completion": "a", "system": "s"}
    base = write([], "empty.jsonl")
    return DataConfig(
        mixture=[SourceConfig(one), SourceConfig(two, columns=columns, weight=1.5)],
        cache_dir=f"{Path(base.cache_dir)}{folder}",
        **{
            "num_held_out": 20,
            "max_length": 256,
            "max_bad_fraction": 0.2,
            "ignore_fields": "extra",
            **data,
        },
    )


def content(config: DataConfig) -> dict[str, bytes]:
    """All files of the one entry in the cache."""
    [entry] = entries(config)
    folder = Path(config.cache_dir) / "corpora" / entry
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_several_processes_make_the_entry_of_one(
    write: Callable[..., DataConfig], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = mixture(write, "one", num_workers=1)
    made = prepare(one, tiny_tokenizer)
    assert made.report.num_bad_rows > 0 and made.report.num_truncated == 2
    assert made.report.sources[0].formats == {"alpaca": 162, "messages": 3}

    def never(*_: object) -> None:
        raise AssertionError("made here")

    three = mixture(write, "three", num_workers=3)
    here = ShardMaker.make
    monkeypatch.setattr(
        ShardMaker, "make", lambda maker, *given: (maker.usual and never()) or here(maker, *given)
    )
    monkeypatch.setattr(pool, "_ALONE_ROWS", 0)
    again = prepare(three, tiny_tokenizer)
    assert content(three) == content(one)
    assert again.fingerprint == made.fingerprint and again.report == made.report


def test_shards_of_any_size_make_the_same_entry(
    write: Callable[..., DataConfig], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mixture(write, "1")
    prepare(made, tiny_tokenizer)
    for name, value in (("_SHARD_ROWS", 1), ("_SHARD_ROWS", 10_000), ("_SHARD_BYTES", 500)):
        monkeypatch.setattr(pool, name, value)
        other = mixture(write, f"{name}{value}", num_workers=1)
        prepare(other, tiny_tokenizer)
        assert content(other) == content(made)


@pytest.fixture
def made_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many rows every shard had that was made in this process."""
    made: list[int] = []
    whole = ShardMaker.make

    def make(maker: ShardMaker, template: Any, rows: Any) -> Any:
        made.append(len(rows))
        return whole(maker, template, rows)

    monkeypatch.setattr(ShardMaker, "make", make)
    yield made


def test_finished_shards_of_an_interrupted_preparation_are_used(
    write: Callable[..., DataConfig],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    made_rows: list[int],
) -> None:
    reference = mixture(write, "reference", num_workers=1)
    prepare(reference, tiny_tokenizer)
    config, append = mixture(write, "x", num_workers=1), DocumentWriter.append
    left = 7

    def interrupt(*given: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        append(*given)

    monkeypatch.setattr(DocumentWriter, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tiny_tokenizer)
    [left_over] = entries(config)
    shards = sorted((Path(config.cache_dir) / "corpora" / left_over).iterdir())
    assert left_over.endswith(".shards") and len(shards) >= 5
    kept = [Shard.load(shard) for shard in shards[2:]]
    shards[0].write_bytes(shards[0].read_bytes()[:-40])  # cut short
    damaged = bytearray(shards[1].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shards[1].write_bytes(damaged)
    monkeypatch.setattr(DocumentWriter, "append", append)
    made_rows.clear()
    prepare(config, tiny_tokenizer)
    all_rows = len(rows_of_all_kinds()) + 70
    assert sum(made_rows) == all_rows - sum(shard.report.num_rows for shard in kept if shard)
    assert content(config) == content(reference)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_mistakes_are_those_of_one_process(
    num_workers: int, write: Callable[..., DataConfig], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    """The row's number and the sentence."""
    rows = [json.dumps(row) for row in numbered(150)]
    rows[120] = rows[140] = json.dumps({"instruction": "no answer"})
    (tmp_path / "bad.jsonl").write_text("\n".join(rows))
    config = write([], num_workers=num_workers, max_bad_fraction=0.01)
    config.source = str(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=r"2 of 150 rows cannot.*row 121: .*'output' is missing"):
        prepare(config, tiny_tokenizer)


def test_file_that_ends_being_readable_is_refused_by_its_last_row(
    write: Callable[..., DataConfig], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    config = write([], num_workers=1)
    draws = random.Random(0)  # more than one read of the file
    rows = [json.dumps(row | {"output": draws.randbytes(200).hex()}) for row in numbered(900)]
    packed = gzip.compress("\n".join(rows).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-2000])
    config.source = str(tmp_path / "cut.jsonl.gz")
    with pytest.raises(UserError, match=r"is a damaged gzip file after row \d{3}:"):
        prepare(config, tiny_tokenizer)


@pytest.mark.parametrize("when", ["while it makes a shard", "afterwards"])
def test_process_that_ends_is_reported(
    when: str,
    write: Callable[..., DataConfig],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dead:
        def __init__(self, *_: object) -> None: ...

        def submit(self, *_: object) -> Future[None]:
            if when == "afterwards":
                raise BrokenProcessPool
            future: Future[None] = Future()
            future.set_exception(BrokenProcessPool())
            return future

        def shutdown(self, **_: object) -> None: ...

    monkeypatch.setattr(pool, "ProcessPoolExecutor", Dead)
    with pytest.raises(UserError, match=r"One of the 2 processes.*lower data\.num_workers"):
        prepare(write(numbered(90), num_workers=2), tiny_tokenizer)


def prepare_slowly(config: DataConfig, folder: str) -> None:
    pool._ALONE_ROWS, pool._SHARD_ROWS = 40, 20
    append = DocumentWriter.append

    def slowly(*given: Any) -> None:
        time.sleep(0.3)
        append(*given)

    DocumentWriter.append = slowly  # type: ignore[method-assign]
    prepare(config, AutoTokenizer.from_pretrained(folder))


def children_of(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(child) for child in found]


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # dead, and not yet reaped


@pytest.mark.parametrize("num_shards", [0, 4])
def test_a_killed_preparation_leaves_no_process_and_is_continued(
    num_shards: int, write: Callable[..., DataConfig], tiny_tokenizer: Any, made_rows: list[int]
) -> None:
    """Also where its processes have not finished their start."""
    config = write(numbered(1000), num_workers=2)
    process = multiprocessing.get_context("spawn").Process(
        target=prepare_slowly, args=(config, tiny_tokenizer.name_or_path)
    )
    # A parent may ignore the signal by which its children end.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process.start()
    corpora, deadline = Path(config.cache_dir) / "corpora", time.time() + DEADLINE_SECONDS
    assert process.pid is not None
    while (
        len(workers := children_of(process.pid)) < config.num_workers
        or len(list(corpora.glob("*.shards/*.npz"))) < num_shards
    ):
        assert time.time() < deadline and process.is_alive()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE_SECONDS)
    while any(map(is_alive, workers)):
        assert time.time() < deadline
        time.sleep(0.05)
    kept = len(list(corpora.glob("*.shards/*.npz")))
    config.num_workers = 1
    made = prepare(config, tiny_tokenizer)
    assert len(made.train) == 1000 and entries(config) == [made.fingerprint]
    assert sum(made_rows) == 1000 - 20 * kept


@pytest.mark.parametrize("alone", [0, 40])
def test_mistake_in_an_earlier_row_comes_first(
    alone: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process tokenises the rows before the place where the reading ends."""
    monkeypatch.setattr(pool, "_ALONE_ROWS", alone)

    class Maker:
        usual, source = "alpaca", 0

        def make(self, template: Any, rows: Any) -> None:
            raise UserError("earlier")

    def rows() -> Iterator[Any]:
        yield from (("", {}) for _ in range(5))
        raise UserError("later")

    made: Any = pool.ShardPool(
        tmp_path,
        SimpleNamespace(config=SimpleNamespace(num_workers=1)),  # type: ignore[arg-type]
    )
    with pytest.raises(UserError, match="earlier"):
        next(made.shards(Maker(), rows()))
