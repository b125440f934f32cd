"""Runs that hang, each in another way; runs that only look so; and stragglers."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.checkpoint import store
from neftune_dist.distributed import hang_report, outcome, straggler, watchdog
from tests.distributed import drill
from tests.support import tiny_model

LIMIT = "train.hang_minutes=0.1"
FORWARD = {
    "fsdp2": "neftune_dist.engine.fsdp2:FSDP2Engine.forward",
    "zero-3": "neftune_dist.engine.deepspeed:DeepSpeedEngine.forward",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drill.make_config(tmp_path_factory.mktemp("watchdog"))


def sleep_forever() -> None:
    time.sleep(1000)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_interpreter() -> None:
    """In native code that neither returns nor lets another thread run nor hears of signals."""
    native, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):
        native.pthread_mutex_lock(mutex)


@dataclass(frozen=True)
class Fault:
    """In one rank, `act` before a function's `first` call, counted from 1."""

    rank: int
    function: str  # module:name
    act: Callable[[], None]
    first: int = 1
    patience_seconds: float = watchdog._PATIENCE_SECONDS

    def __call__(self) -> None:
        watchdog._PATIENCE_SECONDS = self.patience_seconds
        if self.rank != int(os.environ.get("RANK", "0")):
            return
        module, _, path = self.function.partition(":")
        *outer, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        work, count = getattr(owner, name), itertools.count(1)

        def faulty(*arguments: Any, **named: Any) -> Any:
            if next(count) == self.first:
                self.act()
            return work(*arguments, **named)

        setattr(owner, name, faulty)


@dataclass(frozen=True)
class Hang:
    """How a run ended that was ended by the watchdog."""

    done: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def cause(self) -> str:
        """The sentence; said once, and left in the folder in the same words."""
        found = re.findall(r"^neftune-dist: hang: (.*)$", self.done.stderr, re.MULTILINE)
        assert len(found) == 1, self.done.stdout + self.done.stderr
        assert (self.folder / "hang.txt").read_text() in self.done.stderr
        return str(found[0])

    def stacks(self, rank: int) -> str:
        return (self.folder / f"hang_rank_{rank}_stacks.txt").read_text()

    def collectives(self, rank: int) -> list[dict[str, Any]]:
        text = (self.folder / f"hang_rank_{rank}_collectives.json").read_text()
        return list(json.loads(text)["gloo"]["entries"])


def run(config: Path, run_dir: Path, *words: str, **options: Any) -> Hang:
    """Train until it ends by itself; what was published is sound."""
    done = tiny_model.run_forked("train", config, f"run_dir={run_dir}", LIMIT, *words, **options)
    assert done.returncode == outcome.EXIT_FAILED, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    drill.check_published(run_dir, newest=0)
    return Hang(done, run_dir / "logs")


@pytest.mark.parametrize("engine", FORWARD)
def test_rank_that_does_not_come_is_named(engine: str, config: Path, tmp_path: Path) -> None:
    """It is named, with what the others wait in and where it stands itself; the run goes on from
    its last checkpoint."""
    fault = Fault(1, FORWARD[engine], sleep_forever, first=6)
    ended = run(config, tmp_path / "run", *drill.ENGINES[engine], ranks=3, before=fault)
    came = re.fullmatch(
        r"rank 1 did not come to (\w+); "
        r"rank 1 stands in step (\d): forward and backward 1 of 1, at test_watchdog.py:\d+ in "
        r"sleep_forever; ranks 0 and 2 wait in (\w+)",
        ended.cause,
    )
    assert came and came[1] == came[3], ended.cause
    step = int(came[2])
    assert store.find_all(tmp_path / "run")[0].step in (step - 1, step - 2)
    number = re.search(rf"rank 0: .*; waits in {came[1]}, number (\d+)", ended.done.stderr)
    assert number
    for rank in range(3):
        assert ("sleep_forever" in ended.stacks(rank)) == (rank == 1)
        assert "in train_step" in ended.stacks(rank)
        pending = {
            (entry["profiling_name"].rpartition(":")[2].lstrip("_"), entry["collective_seq_id"])
            for entry in ended.collectives(rank)
            if not entry["retired"]
        }
        assert ((came[1], int(number[1])) in pending) == (rank != 1)
    records = tiny_model.train(config, tmp_path / "run", *drill.ENGINES[engine], ranks=3)
    assert [record["step"] for record in records] == list(range(1, drill.STEPS + 1))


def test_one_rank_alone(config: Path, tmp_path: Path) -> None:
    fault = Fault(0, FORWARD["fsdp2"], sleep_forever, first=6)
    ended = run(config, tmp_path / "run", ranks=1, before=fault)
    place = r"at test_watchdog.py:\d+ in sleep_forever"
    assert re.fullmatch(rf"rank 0 stands in step \d: forward and .*, {place}", ended.cause)
    assert "sleep_forever" in ended.stacks(0)
    assert ended.collectives(0)


def test_stalled_loader_is_named(config: Path, tmp_path: Path) -> None:
    fault = Fault(1, "neftune_dist.data.loader:Loader.step", sleep_forever, first=5)
    ended = run(config, tmp_path / "run", ranks=2, before=fault)
    assert re.fullmatch(
        r"rank 1 did not come to \w+; rank 1 stands in step 4: waiting for data, at "
        r"loader.py:\d+ in _prefetch; rank 0 waits in \w+",
        ended.cause,
    ), ended.cause
    assert "sleep_forever" in ended.stacks(1)


def test_frozen_rank_is_named(config: Path, tmp_path: Path) -> None:
    fault = Fault(1, FORWARD["fsdp2"], freeze, first=6)
    ended = run(config, tmp_path / "run", ranks=3, before=fault, grace_seconds=1)
    assert re.fullmatch(r"rank 1 does not answer; ranks 0 and 2 wait in \w+", ended.cause)
    for rank in (0, 2):
        assert "in train_step" in ended.stacks(rank)
        assert ended.collectives(rank)


def test_frozen_rank_with_the_store_ends_the_run(config: Path, tmp_path: Path) -> None:
    """The others have nobody to ask, and end all the same."""
    fault = Fault(0, FORWARD["fsdp2"], freeze, first=6, patience_seconds=3)
    ended = run(config, tmp_path / "run", ranks=2, before=fault, grace_seconds=1)
    assert ended.cause == watchdog._NO_STORE
    assert "in train_step" in ended.stacks(1)


def test_rank_without_running_threads_ends(config: Path, tmp_path: Path) -> None:
    """Native code holds the interpreter: the rank answers nobody, and still leaves its stacks."""
    fault = Fault(1, FORWARD["fsdp2"], hold_the_interpreter, first=6)
    ended = run(config, tmp_path / "run", ranks=2, before=fault)
    assert re.fullmatch(r"rank 1 does not answer; rank 0 waits in \w+", ended.cause)
    assert "hold_the_interpreter" in ended.stacks(1)


@dataclass(frozen=True)
class Fails:
    """One rank fails, in a step or before the first one; the other waits for it, as in a collective
    of NCCL or for its work on the host, and hears of it by the store alone."""

    rank: int
    function: str
    first: int

    def __call__(self) -> None:
        watchdog._OUTLIVE_SECONDS = 1.0
        Fault(self.rank, self.function, self.fail, self.first)()
        if self.first > 1:
            Fault(1 - self.rank, self.function, sleep_forever, self.first)()

    @staticmethod
    def fail() -> None:
        raise ValueError("boom")


@pytest.mark.parametrize(
    ("fault", "heard"),
    [
        (Fails(1, FORWARD["fsdp2"], 6), "rank 0 lost another: rank 1 failed: ValueError: boom"),
        (Fails(0, FORWARD["fsdp2"], 6), "rank 1 lost another: the rendezvous store has gone"),
        (
            Fails(1, "neftune_dist.training.train:read_inputs", 1),
            "ConnectionError: rank 1 failed: ValueError: boom",
        ),
    ],
)
def test_ranks_end_with_one_that_failed(
    fault: Fails, heard: str, config: Path, tmp_path: Path
) -> None:
    words = (f"run_dir={tmp_path / 'run'}", "train.hang_minutes=10")
    done = tiny_model.run_forked("train", config, *words, ranks=2, before=fault, grace_seconds=60)
    assert done.returncode == outcome.EXIT_FAILED
    assert "ValueError: boom" in done.stderr
    assert heard in done.stderr


def test_hang_is_reported_to_the_launcher(config: Path, tmp_path: Path) -> None:
    """Under torchrun, which ends all ranks as soon as one has ended; and the words are the same
    when the same happens again, so that the launcher would not try it a third time."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'RANK' in os.environ and 'train' in sys.orig_argv:\n"
        "    from tests.distributed import test_watchdog as faults\n"
        f"    faults.Fault(1, {FORWARD['fsdp2']!r}, faults.sleep_forever, first=6)()\n"
    )
    run_dir = tmp_path / "run"
    done = tiny_model.run(
        "launch",
        config,
        f"run_dir={run_dir}",
        LIMIT,
        "checkpoint.every_steps=0",
        *("--processes=2", "--max-restarts=0"),
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]),
    )
    assert done.returncode == outcome.EXIT_FAILED, done.stdout + done.stderr
    (ended,) = outcome.outcomes(run_dir)
    assert ended.kind == outcome.FAILED
    assert re.match(r"hang: rank 1 did not come to \w+; .* in sleep_forever;", ended.error)
    folder = run_dir / "logs" / "attempt_0001"
    assert ended.error in (folder / "hang.txt").read_text()
    for rank in range(2):
        assert ("sleep_forever" in Hang(done, folder).stacks(rank)) == (rank == 1)
    fault = Fault(1, FORWARD["fsdp2"], sleep_forever, first=6)
    words = ("checkpoint.every_steps=0",)
    again = run(config, tmp_path / "again", *words, ranks=2, before=fault)
    assert ended.error == f"hang: {again.cause}"


@dataclass(frozen=True)
class Slow:
    """The first two batches of an evaluation take four seconds each, every save eight."""

    def __call__(self) -> None:
        from neftune_dist.checkpoint import flat
        from neftune_dist.training import held_out

        batches, write = held_out.evaluation_batches, flat.write

        def slow_batches(*arguments: Any) -> Any:
            found = list(batches(*arguments))
            assert len(found) > 1
            for number, batch in enumerate(found):
                time.sleep(4 if number < 2 else 0)
                yield batch

        def slow_write(*arguments: Any) -> Any:
            time.sleep(8)
            return write(*arguments)

        held_out.evaluation_batches, flat.write = slow_batches, slow_write


def left_behind(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "logs").glob("hang*")]


def test_long_evaluations_and_saves_are_no_hang(config: Path, tmp_path: Path) -> None:
    """Each takes longer than the limit; a batch of the evaluation does not."""
    words = ["train.max_steps=1", "train.micro_batch_tokens=96", "checkpoint.mode=sync"]
    run_dir = tmp_path / "run"
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", LIMIT, *words, ranks=2, before=Slow()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert left_behind(run_dir) == []


@dataclass(frozen=True)
class Unwatched:
    """Neither a watchdog nor measurements."""

    def __call__(self) -> None:
        watchdog.Watchdog.__init__ = lambda *_: None  # type: ignore[assignment]
        watchdog.Watchdog.at = lambda *_, **__: None  # type: ignore[method-assign]
        watchdog.Watchdog.close = lambda *_: None  # type: ignore[method-assign]
        straggler.Stragglers.measure = lambda *_: (0.0, 0.0)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Watched:
    """Measurements at every other step, of a rank that computes in so many seconds and waits for
    its data as long; the record of collectives is kept."""

    folder: Path
    probe_seconds: tuple[float, float] = (1.0, 1.0)
    data_seconds: tuple[float, float] = (0.0, 0.0)

    def __call__(self) -> None:
        rank = int(os.environ["RANK"])
        straggler._EVERY_STEPS = 2
        probe, close = straggler.Stragglers._probe, watchdog.Watchdog.close
        waited = straggler.Stragglers.waited

        def timed(stragglers: Any) -> float:
            assert probe(stragglers) > 0
            return self.probe_seconds[rank]

        def closed(dog: Any) -> None:
            (self.folder / f"record_{rank}.json").write_text(
                json.dumps(hang_report.flight_record())
            )
            close(dog)

        def slowly(stragglers: Any, _: float) -> None:
            time.sleep(self.data_seconds[rank])
            waited(stragglers, self.data_seconds[rank])

        straggler.Stragglers._probe = timed  # type: ignore[method-assign]
        straggler.Stragglers.waited = slowly  # type: ignore[method-assign]
        watchdog.Watchdog.close = closed  # type: ignore[method-assign]


def train(config: Path, run_dir: Path, before: Callable[[], None], *words: str) -> str:
    """A whole run of two ranks; what it printed."""
    done = tiny_model.run_forked(
        "train", config, f"run_dir={run_dir}", *words, ranks=2, before=before
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("engine", FORWARD)
def test_watchdog_does_not_change_an_ordinary_run(
    engine: str, config: Path, tmp_path: Path
) -> None:
    """To the last bit; no word of stragglers, no files; and the collectives' own time-out, of all
    groups but the saver's, comes after the watchdog."""
    words = [*drill.ENGINES[engine], "train.hang_minutes=50"]
    printed = train(config, tmp_path / "watched", Watched(tmp_path), *words)
    train(config, tmp_path / "unwatched", Unwatched(), *words)
    drill.compare(tmp_path / "watched", tmp_path / "unwatched")
    assert "straggler" not in printed
    assert left_behind(tmp_path / "watched") == []
    entries = json.loads((tmp_path / "record_0.json").read_text())["gloo"]["entries"]
    of_saver, of_step = 120 * 60_000, 100 * 60_000
    assert {entry["timeout_ms"] for entry in entries[-20:]} == {of_saver, of_step}


def test_stragglers_are_named(config: Path, tmp_path: Path) -> None:
    """Once each, in eight steps of which four are measured."""
    watched = Watched(tmp_path, probe_seconds=(1.0, 1.8), data_seconds=(0.5, 0.0))
    printed = train(config, tmp_path / "run", watched).splitlines()
    host = re.escape(socket.gethostname())
    words = [line for line in printed if line.startswith("straggler")]
    assert len(words) == 2, words
    assert words[0] == (
        f"straggler: rank 1 on {host} computes at 0.56 of the median rank's speed (3 probes in a "
        "row)"
    )
    assert re.fullmatch(
        rf"straggler: rank 0 on {host} waited for data, for up to \d\d% .*", words[1]
    )
