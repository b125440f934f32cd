"""The launcher on this machine: it starts again after a death, and saves when asked to stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from neftune_dist.checkpoint import store
from neftune_dist.cluster.launch.torchrun import LOOPBACK, listen
from neftune_dist.distributed.world import World
from tests.distributed import drill
from tests.slurm.cluster import ROOT, SCRIPT, process_of_rank
from tests.support import tiny_model

STEPS = 12
WORDS = (f"train.max_steps={STEPS}", "checkpoint.every_steps=3")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def untouched(config: Path) -> Path:
    tiny_model.train(config, config.parent / "untouched", *WORDS, ranks=2)
    return config.parent / "untouched"


@contextmanager
def launched(
    config: Path, run_dir: Path, *words: str, ranks: int = 2, **faults: object
) -> Iterator[subprocess.Popen[str]]:
    """launcher/torchrun.sh under way; it must end by itself. A rank takes seconds to start: one is
    enough where the ranks do not act on each other."""
    path = os.pathsep.join([str(SCRIPT.parent / "faults"), str(ROOT)])
    process = subprocess.Popen(
        [str(ROOT / "launcher/torchrun.sh"), str(config), f"run_dir={run_dir}", *WORDS, *words],
        env=tiny_model.environment(NPROC=str(ranks), PYTHONPATH=path, FAULTS=json.dumps(faults)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    text = process.communicate(timeout=tiny_model.DEADLINE_SECONDS)[0]
    return process.returncode, text


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + tiny_model.DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kinds(run_dir: Path) -> list[str]:
    folders = sorted((run_dir / "logs").glob("attempt_*"))
    return [json.loads((folder / "outcome.json").read_text())["kind"] for folder in folders]


def same(run_dir: Path, untouched: Path) -> None:
    """Records, weights and moments, bit for bit; no step lost or done twice."""
    assert tiny_model.untimed(tiny_model.steps(run_dir)) == tiny_model.untimed(
        tiny_model.steps(untouched)
    )
    ours, theirs = (
        tiny_model.checkpoint_tensors(store.find_all(run)[0].folder) for run in (run_dir, untouched)
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)


def test_killed_rank_is_restarted_to_the_same_end(
    config: Path, untouched: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    # Which is said of the first start alone.
    with launched(config, run_dir, "checkpoint.resume=never", step_seconds=0.3) as process:
        # Another launcher is refused, and its end is not taken for this one's. It starts while this
        # one's ranks do, so that the run cannot end meanwhile.
        until(lambda: (run_dir / "logs" / "attempt_0001").exists())
        with launched(config, run_dir) as second:
            code, text = end(second)
        assert code == 2 and "is in use by another launch" in text and "Traceback" not in text
        until(lambda: len(tiny_model.steps(run_dir)) >= 5)
        os.kill(process_of_rank(1, run_dir), signal.SIGKILL)
        code, text = end(process)
    assert code == 0, text
    assert re.search(r"rank 1 died: killed by SIGKILL; starting again from step [369]\n", text)
    assert kinds(run_dir) == ["failed", "done"]
    same(run_dir, untouched)
    # Rank 0 speaks on the console, which is kept; every other rank has a log of its own.
    first = run_dir / "logs" / "attempt_0001"
    assert "engine: fsdp2" in (first / "console.log").read_text()
    assert (first / "rank_1.log").exists()
    assert not any(path.stat().st_mode & 0o111 for path in first.iterdir())


def test_ranks_end_with_a_launcher_that_is_killed(config: Path, tmp_path: Path) -> None:
    """After their step, saved; and the same command goes on from there."""
    run_dir = tmp_path / "run"
    with launched(config, run_dir, ranks=1, step_seconds=0.3) as process:
        until(lambda: len(tiny_model.steps(run_dir)) >= 4)
        process.kill()
        process.wait()
        with launched(config, run_dir, ranks=1, step_seconds=0.3) as second:
            code, text = end(second)
    assert code == 0, text
    assert "resume: " in text
    assert [record["step"] for record in tiny_model.steps(run_dir)] == list(range(1, STEPS + 1))
    with pytest.raises(LookupError):
        process_of_rank(0, run_dir)


def test_unread_console_does_not_end_a_run(config: Path, tmp_path: Path) -> None:
    """`launch | head -1`: it starts again after a death, saves when asked, says so by its code."""
    run_dir = tmp_path / "run"
    with launched(config, run_dir, ranks=1, step_seconds=0.3) as process:
        assert process.stdout and process.stdout.readline()
        process.stdout.close()
        until(lambda: len(tiny_model.steps(run_dir)) >= 4)
        os.kill(process_of_rank(0, run_dir), signal.SIGKILL)
        second = run_dir / "logs" / "attempt_0002"
        until(lambda: second.exists() and len(tiny_model.steps(run_dir)) >= 6)
        process.terminate()
        assert process.wait(tiny_model.DEADLINE_SECONDS) == 75
    assert kinds(run_dir) == ["failed", "stopped"]
    assert "stopped at step" in (second / "console.log").read_text()


def _meet(port: int, restarts: int) -> None:
    """A rank of torchrun's, whose agent keeps the store; the first ones die. Each machine's agent
    counts the failures of its own ranks."""
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restarts * int(os.environ["RANK"]))
    time.sleep(restarts * int(os.environ["RANK"]))  # so that the other one looks first
    world = World()
    assert world.gather([1.0]) == [[1.0], [1.0]]
    if not restarts:
        os._exit(0)
    world.close()


def test_ranks_that_torchrun_starts_again_do_not_look_for_the_dead() -> None:
    agents = listen(LOOPBACK, 0)
    for restarts in range(2):
        done = tiny_model.call_forked(partial(_meet, agents.port, restarts), ranks=2)
        assert done.returncode == 0, done.stderr


def test_removed_run_directory_is_one_sentence(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with launched(config, run_dir, ranks=1, step_seconds=0.3) as process:
        until(lambda: len(tiny_model.steps(run_dir)) >= 2)
        run_dir.rename(tmp_path / "aside")
        shutil.rmtree(tmp_path / "aside")
        code, text = end(process)
    assert code == 2, text
    assert "Traceback" not in text
    assert f"run_dir={run_dir} was removed" in text.splitlines()[-1]
    assert not run_dir.exists()


def test_ctrl_c_saves_and_the_same_command_continues(
    config: Path, untouched: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with launched(config, run_dir, step_seconds=0.3) as process:
        until(lambda: len(tiny_model.steps(run_dir)) >= 4)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all in the foreground
        code, text = end(process)
    assert code == 75, text
    assert "Traceback" not in text
    assert store.find_all(run_dir)[0].step == len(tiny_model.steps(run_dir)) >= 4
    tiny_model.train(config, run_dir, *WORDS, ranks=2)
    same(run_dir, untouched)


def test_second_ctrl_c_ends_at_once(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with launched(config, run_dir, ranks=1, step_seconds=100) as process:
        until(lambda: (run_dir / "evaluations.jsonl").exists())
        process.send_signal(signal.SIGINT)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        code, text = end(process)
    assert code == 130, text
    with pytest.raises(LookupError):
        process_of_rank(0, run_dir)


def test_repeated_failure_is_not_tried_a_third_time(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with launched(config, run_dir, ranks=1, fail_at=5) as process:
        code, text = end(process)
    assert code == 1, text
    assert "failed after step 4: ValueError: step 5; twice the same, so it is not tried" in text
    assert kinds(run_dir) == ["failed", "failed"]
    assert drill.check_published(run_dir, 3) == 3


def test_diverged_run_is_not_restarted(config: Path, tmp_path: Path) -> None:
    with launched(config, tmp_path / "run", diverge=True) as process:
        code, text = end(process)
    assert code == 1, text
    assert "Traceback" not in text and text.count("loss is not finite") == 1
    assert "neftune-dist: The loss is not finite; see " in text
    assert kinds(tmp_path / "run") == ["final"]


def test_mistake_is_printed_once(config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with launched(config, run_dir, "data.source=/nowhere.jsonl") as process:
        code, text = end(process)
    assert code == 2, text
    assert "Traceback" not in text and text.count("data.source=/nowhere.jsonl") == 1
    assert kinds(run_dir) == ["mistake"]
    log = run_dir / "logs" / "attempt_0001" / "console.log"
    assert log.read_text().splitlines()[-1] == text.splitlines()[-1]
    with launched(config, run_dir, "data.sorce=x") as process:
        code, text = end(process)
    assert code == 2 and "did you mean data.source?" in text
    assert kinds(run_dir) == ["mistake"]  # refused before anything was started
