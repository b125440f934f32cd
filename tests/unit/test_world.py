"""Ranks that agree and wait for each other, each a thread over one store in memory."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from neftune_dist.config import UserError
from neftune_dist.distributed import device, outcome, process_group
from neftune_dist.distributed import world as module
from neftune_dist.distributed.environment import Place
from neftune_dist.distributed.signals import Stopped, StopSignal
from neftune_dist.distributed.world import World

# Of a rank for the others, which come at once: whatever goes wrong, the test ends.
WAIT_SECONDS = 10.0


def worlds(size: int) -> list[World]:
    store, made = dist.HashStore(), []
    for rank in range(size):
        world = object.__new__(World)  # without a process group
        world.rank = world.local_rank = rank
        world.size = world.local_size = size
        world.device = torch.device("cpu")
        world._store = dist.PrefixStore("run", store)
        world._phase = world._num_threads = 0
        world._stop, world._patience_seconds = None, WAIT_SECONDS
        made.append(world)
    return made


def on_all(made: list[World], work: Callable[[World], Any]) -> list[Any]:
    """Results of `work`, or its errors, by rank."""

    def caught(world: World) -> Any:
        try:
            return work(world)
        except (Exception, Stopped) as error:
            return error

    with ThreadPoolExecutor(len(made)) as pool:
        return list(pool.map(caught, made))


def test_ranks_leave_a_block_when_the_last_one_has_come() -> None:
    left: list[float] = []

    def work(world: World) -> None:
        for phase in range(2):
            with world.agree():
                time.sleep(0.3 if world.rank == phase else 0.0)
                if world.rank == phase:
                    left.append(time.monotonic())
            assert time.monotonic() >= left[phase]

    assert on_all(worlds(3), work) == [None] * 3


def test_error_reaches_waiting_ranks_before_busy_ones_come() -> None:
    made, release = worlds(3), threading.Event()

    def work(world: World) -> None:
        with world.agree():
            if world.rank == 2:
                assert release.wait(10)
            if world.rank == 1:
                raise UserError("no such file")

    pool = ThreadPoolExecutor(3)
    runs = [pool.submit(work, world) for world in made]
    for run in runs[:2]:
        with pytest.raises(UserError, match="no such file"):
            run.result(5)
    assert not runs[2].done()
    release.set()
    with pytest.raises(UserError, match="no such file"):
        runs[2].result(5)


def test_values_of_ranks_reach_all() -> None:
    made = worlds(3)
    assert on_all(made, lambda world: world.from_first(f"by {world.rank}")) == ["by 0"] * 3
    one = on_all(made, lambda world: world.from_any("x" if world.rank == 2 else None))
    assert one == ["x"] * 3
    assert on_all(made, lambda world: world.from_any(None)) == [None] * 3


def test_first_rank_of_a_machine_works_before_the_others() -> None:
    order: list[int] = []

    def work(world: World) -> int:
        time.sleep(0.0 if world.rank else 0.2)
        order.append(world.rank)
        return world.rank

    made = worlds(3)
    assert on_all(made, lambda world: world.local_rank_zero_first(lambda: work(world))) == [0, 1, 2]
    assert order[0] == 0 and sorted(order) == [0, 1, 2]


def test_rank_that_stops_ends_the_wait_of_the_others() -> None:
    first, second = worlds(2)

    def wait() -> None:
        with first.agree():
            pass

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(wait)
        time.sleep(0.1)
        assert not waiting.done()
        second.tell_stopped()
        with pytest.raises(Stopped):
            waiting.result(5)


def asked_to_stop(since: float) -> StopSignal:
    stop = object.__new__(StopSignal)  # without handlers of signals
    stop.since = since
    return stop


def await_all(store: dist.Store, rank: int, size: int) -> dist.Store:
    return process_group._await_all(store, Place(rank, size), None)


def test_ranks_go_on_when_all_have_started_and_once_more_when_they_are_started_again() -> None:
    """Each agent of torchrun counts its own machine's failures alone, and keeps the store."""
    store = dist.HashStore()
    for start in range(2):
        if start:  # a rank that was killed as it began
            store.add("arrivals", 1)
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(await_all, store, rank, 3) for rank in (1, 2)]
            time.sleep(0.1)
            assert not any(other.done() for other in others)
            first = pool.submit(await_all, store, 0, 3).result(WAIT_SECONDS)
            assert not first.check(["address"])
            first.set("address", "")
            assert all(other.result(WAIT_SECONDS).check(["address"]) for other in others)


def test_rank_that_comes_twice_counts_once() -> None:
    """Where an agent of torchrun has started its ranks again while others still start."""
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        early = [pool.submit(await_all, store, rank, 3) for rank in (0, 1, 1)]
        time.sleep(0.3)
        assert not any(rank.done() for rank in early)
        await_all(store, 2, 3)


def test_rank_with_other_versions_is_refused() -> None:
    store = dist.HashStore()
    number = store.add("arrivals", 1)
    start = dist.PrefixStore(f"start {number}", store)
    start.set("here/0", json.dumps(process_group.package_versions() | {"torch": "1.0"}))
    start.add("number here", 1)
    store.set(f"start of {number + 1}", str(number))
    with pytest.raises(UserError, match=rf"Rank 1, .* has torch {torch.__version__.split('+')[0]}"):
        await_all(store, 1, 2)


@pytest.mark.parametrize("by_launcher", [False, True])
def test_ranks_that_do_not_start_are_named(
    by_launcher: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose imports hang, for example. A launcher starts all of them again."""
    monkeypatch.setattr(process_group, "_MEETING_SECONDS", 0.3)
    monkeypatch.delenv(outcome.VARIABLE, raising=False)
    if by_launcher:
        monkeypatch.setenv(outcome.VARIABLE, str(tmp_path))
    with pytest.raises(SystemExit if by_launcher else UserError, match=r"^1$|\(rank 0, 2\)"):
        process_group._await_all(dist.HashStore(), Place(1, 3), None)
    if by_launcher:
        ended = outcome.conclude(tmp_path, 0, 0, "")
        assert ended.kind == outcome.FAILED and "2 of 3 ranks did not start" in ended.error


def test_rank_asked_to_stop_does_not_wait_for_those_that_do_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process_group, "STOP_PATIENCE_SECONDS", 0.1)
    with pytest.raises(Stopped):
        process_group._await_all(dist.HashStore(), Place(0, 2), asked_to_stop(time.monotonic()))


def test_rank_asked_to_stop_does_not_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STOP_PATIENCE_SECONDS", 0.3)
    first, second = worlds(2)
    began = time.monotonic()
    first._stop = asked_to_stop(began - 60)
    with pytest.raises(Stopped), first.agree():
        pass
    assert 0.3 <= time.monotonic() - began < 5  # from when the wait began
    with pytest.raises(Stopped), second.agree():  # the first one has said so
        raise Stopped


def test_thread_agrees_by_itself_and_gives_up_on_missing_ranks() -> None:
    made = worlds(2)
    threads = [world.for_thread(0.2) for world in made]
    assert on_all(threads, lambda world: world.from_first(str(world.rank))) == ["0", "0"]
    with pytest.raises(TimeoutError), threads[0].agree():
        pass
    with pytest.raises(UserError), made[0].agree():  # at its own first block
        raise UserError("x")


def test_first_rank_waits_for_the_others_only_where_they_leave_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = worlds(2)
    waits: list[float] = []

    def wait_until(condition: Callable[[], bool], num_ranks: int, seconds: float) -> bool:
        waits.append(seconds)
        return condition()

    monkeypatch.setattr(module, "wait_until", wait_until)
    with pytest.raises(RuntimeError, match="closed by peer"), first:
        raise RuntimeError("connection closed by peer")
    assert not waits  # the other rank may be gone
    for error in (UserError("x"), Stopped()):
        with pytest.raises(type(error)), first:
            raise error
    with first, second:
        pass
    assert len(waits) == 3  # the first rank alone waits


@pytest.mark.parametrize(
    ("size", "error", "ends"),
    [
        (2, None, "destroyed"),
        (2, MemoryError(), "at once"),
        (2, UserError("alone"), "at once"),
        (1, UserError("alone"), "destroyed"),
    ],
)
def test_nccl_is_destroyed_only_where_all_ranks_end_well(
    size: int, error: BaseException | None, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its destruction waits for every collective and for every rank of the machine."""
    found: list[str] = []
    world = worlds(size)[-1]  # rank 0 would wait for the other
    world.device = torch.device("cuda", 0)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: found.append("destroyed"))
    monkeypatch.setattr(module.garbage, "end_at_once", lambda: found.append("at once"))
    world.__exit__(type(error), error, None)
    assert found == [ends]


@pytest.mark.parametrize(
    ("numa_node", "cores", "kept"),
    [("1\n", "2-3,6\n", {3, 6}), ("1\n", "8-9\n", None), ("-1\n", "0-7\n", None), (None, "", None)],
)
def test_a_rank_runs_on_the_cores_beside_its_gpu_that_it_may_use(
    numa_node: str | None,
    cores: str,
    kept: set[int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the program numactl; and where the system does not say which they are, on all."""
    found: list[set[int]] = []
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xDC, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(device, "_SYSTEM", tmp_path)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1, 3, 6})
    monkeypatch.setattr(device.os, "sched_setaffinity", lambda _, chosen: found.append(chosen))
    for name, text in (
        ("bus/pci/devices/0000:dc:00.0/numa_node", numa_node),
        ("devices/system/node/node1/cpulist", cores),
    ):
        (tmp_path / name).parent.mkdir(parents=True)
        if text is not None:
            (tmp_path / name).write_text(text)
    device.set_cpu_affinity(torch.device("cuda", 3))
    assert found == ([kept] if kept else [])
