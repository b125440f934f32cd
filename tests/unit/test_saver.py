"""Saving while training continues: copies, waits, errors, and the choice to copy at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from neftune_dist.checkpoint import flat, store
from neftune_dist.checkpoint.saver import Saver
from neftune_dist.config import CheckpointConfig, UserError
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import MASTER, FlatShard
from neftune_dist.system import cgroups
from tests.support import tiny_model


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    alone = World()
    yield alone
    alone.close()


class FakeEngine:
    """One tensor; whether this rank's replica is saved can be set."""

    def __init__(self) -> None:
        self.tensor = torch.zeros(9)
        self.is_saving_replica = True

    def flat_state(self) -> list[FlatShard]:
        return [FlatShard(MASTER, "a", 0, self.tensor, 9)]


@pytest.fixture
def engine() -> Any:
    return FakeEngine()


def saved(run_dir: Path) -> dict[int, float]:
    """The tensor's value in each checkpoint."""
    return {
        c.step: float(tiny_model.checkpoint_tensors(c.folder)["master/a"].mean())
        for c in store.find_all(run_dir)
    }


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_saves_the_state_as_it_was(
    mode: str, world: World, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asynchronously the tensor changes while it is written."""
    changed, write = threading.Event(), flat.write
    if mode == "async":
        monkeypatch.setattr(flat, "write", lambda *a: (changed.wait(30), write(*a))[1])
    saver = Saver(tmp_path, CheckpointConfig(mode=mode, keep=0), world)
    for step in (1, 2):
        engine.tensor.fill_(step)
        saver.save(step, engine, {})
        engine.tensor.fill_(9)
        changed.set()
    saver.wait()
    assert saved(tmp_path) == {1: 1.0, 2: 2.0}


def test_the_thread_that_writes_uses_the_ranks_gpu(
    world: World, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DCP waits for its current stream, which in a new thread is one of GPU 0."""
    entered: list[tuple[str, torch.device]] = []

    def enter(device: torch.device) -> None:
        entered.append((threading.current_thread().name, device))

    monkeypatch.setattr("neftune_dist.checkpoint.saver.enter_thread", enter)
    made = Saver(tmp_path, CheckpointConfig(mode="async"), world)
    made.save(1, engine, {})
    made.wait()
    assert entered == [("checkpoint", world.device)] and saved(tmp_path)


def test_at_most_one_save_is_in_flight(
    world: World, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, write = [], [], flat.write

    def slow(*arguments: Any) -> Any:
        running.append(1)
        most.append(len(running))
        threading.Event().wait(0.2)
        written = write(*arguments)
        running.pop()
        return written

    monkeypatch.setattr(flat, "write", slow)
    saver = Saver(tmp_path, CheckpointConfig(mode="async", keep=0), world)
    for step in (1, 2, 3):
        saver.save(step, engine, {})
    saver.wait()
    assert most == [1, 1, 1] and len(saved(tmp_path)) == 3


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_error_is_raised_once_and_the_next_save_works(
    mode: str, world: World, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    saver = Saver(tmp_path, CheckpointConfig(mode=mode), world)
    with monkeypatch.context() as patch:
        patch.setattr(flat, "write", full)
        with pytest.raises(UserError, match="step_00000001 could not be written: No space"):
            saver.save(1, engine, {})
            saver.wait()
    assert not saver.failed
    saver.save(2, engine, {})
    saver.wait()
    assert list(saved(tmp_path)) == [2]


def test_failure_shows_before_anybody_waits(
    world: World, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def timed_out(*_: Any) -> Any:
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")

    monkeypatch.setattr(flat, "write", timed_out)
    saver = Saver(tmp_path, CheckpointConfig(mode="async", timeout_minutes=3), world)
    saver.save(1, engine, {})
    saver.abandon()
    assert saver.failed
    with pytest.raises(UserError, match=r"step 1 was not written .*timeout_minutes=3"):
        saver.wait()


def test_replica_that_is_not_saved_writes_nothing(
    world: World, engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards: list[Any] = []
    monkeypatch.setattr(flat, "write", lambda _, given, *__: shards.extend(given) or {})
    engine.is_saving_replica = False
    saver = Saver(tmp_path, CheckpointConfig(mode="sync"), world)
    saver.save(1, engine, {})
    assert shards == []


@pytest.mark.parametrize(
    ("local_size", "available", "others", "are_saved", "copies"),
    [
        (1, 46, 46, True, True),
        (1, 44, 44, True, False),
        (2, 89, 89, True, False),
        (2, 91, 91, True, True),
        (1, 99, 44, True, False),
        (2, 46, 1, False, True),
        (2, 44, 1, False, False),
    ],
)
def test_copies_where_every_machine_has_the_memory(
    local_size: int,
    available: int,
    others: int,
    are_saved: bool,
    copies: bool,
    engine: Any,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """36 bytes a rank that saves, of 80 % of those available: here and on another machine; or of
    the first rank alone, where every rank has the whole model."""

    def gather(mine: Any) -> list[Any]:
        other = mine if are_saved else replace(mine, needed=0)
        there = replace(other, machine=local_size, available=others)
        return [mine, *[other] * (local_size - 1), *[there] * local_size]

    monkeypatch.setattr(cgroups, "memory_bytes", lambda: (available, 0, 0))
    saver = Saver(tmp_path, CheckpointConfig(mode="auto"), world)
    lines: list[str] = []
    saver._world = SimpleNamespace(  # type: ignore[assignment]
        rank=0,
        local_rank=0,
        device=torch.device("cpu"),
        log=lines.append,
        gather_fields=gather,
    )
    saver.prepare(engine)
    assert (saver._copy is not None) == copies
    assert len(lines) == (not copies)


def test_a_replica_that_is_not_saved_takes_no_memory(
    engine: Any, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "memory_bytes", lambda: (44, 0, 0))  # too few for a copy
    engine.is_saving_replica = False
    saver = Saver(tmp_path, CheckpointConfig(mode="auto"), world)
    saver.prepare(engine)
    assert saver._copy is not None
