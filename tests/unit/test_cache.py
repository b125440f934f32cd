"""The cache of tokenised data: one entry whoever makes it, found again, never half made."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data import dataset
from neftune_dist.data.dataset import prepare
from tests.support import tiny_model
from tests.support.corpora import entries, numbered, texts

DEADLINE_SECONDS = 60


# Found again, and only where nothing that decides it has changed.


def test_the_second_time_nothing_is_tokenised(
    write: Callable[..., DataConfig], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*numbered(30), {"instruction": "bad"}]
    config = write(rows, num_held_out=5, max_bad_fraction=0.1)
    first = prepare(config, tiny_tokenizer)

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(dataset.ConversationTokenizer, "encode", never)
    monkeypatch.setattr(dataset.ConversationTokenizer, "render", never)
    second = prepare(config, tiny_tokenizer)
    assert second.fingerprint == first.fingerprint
    assert second.report == first.report
    assert [*second.held_out_conversations] == [*first.held_out_conversations]
    assert texts(second.train, tiny_tokenizer) == texts(first.train, tiny_tokenizer)
    assert texts(second.held_out, tiny_tokenizer) == texts(first.held_out, tiny_tokenizer)
    assert entries(config) == [first.fingerprint]


def test_the_same_content_under_another_name(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    first = prepare(write(numbered(9)), tiny_tokenizer)
    config = write(numbered(9), "copy.jsonl")
    second = prepare(config, tiny_tokenizer)
    assert second.fingerprint == first.fingerprint
    assert second.report.sources[0].name == config.source


@pytest.mark.parametrize(
    "setting",
    [
        {"template": "alpaca"},
        {"supervise": "all"},
        {"max_length": 100},
        {"too_long": "drop"},
        {"num_held_out": 2},
        {"held_out_fraction": 0.2},
        {"format": "alpaca"},
        {"duplicates": "drop"},
    ],
)
def test_other_settings_have_another_fingerprint(
    setting: dict[str, Any], write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    base = prepare(write(numbered(9)), tiny_tokenizer)
    other = prepare(write(numbered(9), **setting), tiny_tokenizer)
    again = prepare(write(numbered(9)), tiny_tokenizer)
    assert base.fingerprint == again.fingerprint != other.fingerprint


def test_other_content_or_tokenizer_has_another_fingerprint(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    chatty, renamed, grown = (copy.deepcopy(tiny_tokenizer) for _ in range(3))
    chatty.chat_template = "{{ bos_token }}" + chatty.chat_template
    renamed.bos_token = "</s>"  # which a chat template may write
    grown.add_tokens(["Count to"])
    made = [
        prepare(write(numbered(9)), tiny_tokenizer),
        prepare(write(numbered(10)), tiny_tokenizer),
        *(prepare(write(numbered(9)), other) for other in (chatty, renamed, grown)),
    ]
    assert len({dataset.fingerprint for dataset in made}) == 5


def test_how_the_tokenizer_was_called_does_not_matter(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Truncation and padding stay set in a tokenizer after a call."""
    used = copy.deepcopy(tiny_tokenizer)
    used(["a b", "c"], padding="max_length", truncation=True, max_length=8)
    fresh, other = (
        prepare(write(numbered(9), f"{i}.jsonl", cache_dir=f"{Path(write([]).cache_dir)}{i}"), t)
        for i, t in enumerate((tiny_tokenizer, used))
    )
    assert fresh.fingerprint == other.fingerprint
    assert texts(fresh.train, used) == texts(other.train, used)


FILES = [
    "input_ids.bin",
    "supervised.bin",
    "train.npy",
    "held_out.npy",
    "held_out.jsonl",
    "origins.jsonl",
    "report.json",
    "checksums.json",
]


def flip(file: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def exchange(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[::-1])


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() * 2),
    "reversed": exchange,
    "an object": lambda file: file.write_text("{}"),
    "missing": lambda file: file.unlink(),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


def test_a_damaged_entry_is_made_again(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Whichever file, however damaged: one sentence, and the documents of the undamaged entry."""
    config = write(numbered(20), num_held_out=3)
    made = prepare(config, tiny_tokenizer)
    entry = Path(config.cache_dir) / "corpora" / made.fingerprint
    assert sorted(path.name for path in entry.iterdir()) == sorted(FILES)
    expected = texts(made.train, tiny_tokenizer), texts(made.held_out, tiny_tokenizer)
    told: list[str] = []
    for name in FILES:
        for damage in DAMAGES.values():
            damage(entry / name)
            again = prepare(config, tiny_tokenizer, told.append)
            assert len(told) == 1 and f"{entry} is damaged and is made again: " in told.pop()
            assert again.report == made.report
            assert (texts(again.train, tiny_tokenizer), texts(again.held_out, tiny_tokenizer)) == (
                expected
            )
            prepare(config, tiny_tokenizer, told.append)
            assert told == []
    assert entries(config) == [made.fingerprint]


@pytest.mark.parametrize("lost", ["input_ids.bin", "checksums.json", None])
def test_an_entry_that_lost_files_is_made_again(
    lost: str | None, write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Also where the list of checksums agrees with what is left: an empty list, no list at all."""
    config = write(numbered(20), num_held_out=3)
    made = prepare(config, tiny_tokenizer)
    entry = Path(config.cache_dir) / "corpora" / made.fingerprint
    for file in entry.iterdir():
        if lost is None or file.name == lost:
            file.unlink()
    if lost is None:
        (entry / "checksums.json").write_text('{"files": {}}')
    assert texts(prepare(config, tiny_tokenizer).train, tiny_tokenizer) == texts(
        made.train, tiny_tokenizer
    )


def test_a_process_that_reads_an_entry_keeps_it_while_it_is_made_again(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    config = write(numbered(20))
    made = prepare(config, tiny_tokenizer)
    before = texts(made.train, tiny_tokenizer)
    (Path(config.cache_dir) / "corpora" / made.fingerprint / "report.json").unlink()
    prepare(config, tiny_tokenizer)
    assert texts(made.train, tiny_tokenizer) == before


# Several processes, and processes that die.


def start(target: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Any]:
    context = tiny_model.forkserver()
    told = context.Queue()
    process = context.Process(target=target, args=(*arguments, told), daemon=True)
    process.start()
    return process, told


def prepare_slowly(config: DataConfig, folder: str, told: Any) -> None:
    """Write, and hang before the entry is renamed."""
    whole = dataset._Builder.build

    def write_and_hang(*arguments: Any) -> None:
        whole(*arguments)
        told.put("written")
        time.sleep(DEADLINE_SECONDS)

    dataset._Builder.build = write_and_hang
    prepare(config, AutoTokenizer.from_pretrained(folder))


def prepare_together(config: DataConfig, folder: str, barrier: Any, told: Any) -> None:
    """Begin when all have begun; write slowly, so that all the others come meanwhile."""
    whole, num_written = dataset._Builder.build, 0

    def write_slowly(*arguments: Any) -> None:
        nonlocal num_written
        num_written += 1
        whole(*arguments)
        time.sleep(0.5)

    dataset._Builder.build = write_slowly
    tokenizer = AutoTokenizer.from_pretrained(folder)
    barrier.wait(DEADLINE_SECONDS)
    made = prepare(config, tokenizer)
    told.put((made.fingerprint, len(made.train), num_written > 0))


def test_processes_at_once_make_one_entry(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    config = write(numbered(300), num_held_out=20)
    barrier = tiny_model.forkserver().Barrier(3)
    started = [
        start(prepare_together, config, tiny_tokenizer.name_or_path, barrier) for _ in range(3)
    ]
    results = [told.get(timeout=DEADLINE_SECONDS) for _, told in started]
    for process, _ in started:
        process.join(DEADLINE_SECONDS)
        assert process.exitcode == 0
    assert {result[1] for result in results} == {280}
    assert sorted(result[2] for result in results) == [False, False, True]
    assert entries(config) == [results[0][0]]
    # A resumed run on another day finds the data of the first.
    here = replace(config, cache_dir=f"{config.cache_dir}2")
    assert prepare(here, tiny_tokenizer).fingerprint == results[0][0]


def test_an_entry_appears_whole_or_not_at_all(
    write: Callable[..., DataConfig], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is given by one rename, after which nothing is written."""
    config = write(numbered(20), num_held_out=3)
    seen = []

    def fail(source: Path, target: Path) -> None:
        seen.append(json.loads((source / "report.json").read_text())["num_documents"])
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(UserError, match="Input/output error"):
        prepare(config, tiny_tokenizer)
    assert seen == [17]
    assert entries(config) == []


def test_a_process_killed_while_making_leaves_nothing_that_loads(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    config = write(numbered(30))
    process, told = start(prepare_slowly, config, tiny_tokenizer.name_or_path)
    assert told.get(timeout=DEADLINE_SECONDS) == "written"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(DEADLINE_SECONDS)
    [left] = entries(config)
    assert left.endswith(".part")
    made = prepare(config, tiny_tokenizer)
    assert len(made.train) == 30
    assert entries(config) == [made.fingerprint]


# A cache that will not do.


@pytest.mark.parametrize("where", ["file/cache", "file"])
def test_a_cache_that_cannot_be_written(
    where: str, write: Callable[..., DataConfig], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    (tmp_path / "file").write_text("no directory")
    config = write(numbered(9), cache_dir=str(tmp_path / where))
    with pytest.raises(UserError, match=r"cannot be written to data\.cache_dir="):
        prepare(config, tiny_tokenizer)


def test_a_cache_of_nobody(write: Callable[..., DataConfig], tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"data\.cache_dir=~nosuchuser/x names no known user"):
        prepare(write(numbered(9), cache_dir="~nosuchuser/x"), tiny_tokenizer)


def test_a_full_disk(
    write: Callable[..., DataConfig], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = write(numbered(20))
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="No space left on device"):
        prepare(config, tiny_tokenizer)
    assert entries(config) == []
