"""The launcher's care for the processes that it starts: output, requests, late nodes, leftovers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from neftune_dist.cluster.launch import node, supervisor
from neftune_dist.cluster.launch.supervisor import Job
from neftune_dist.config import Config, UserError
from neftune_dist.distributed import outcome
from neftune_dist.system import children


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "_LOOK_EVERY_SECONDS", 0.1)
    monkeypatch.setattr(supervisor, "_SIGNAL_EVERY_SECONDS", 0.1)


@pytest.fixture(autouse=True)
def children_of_this_test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher kills all its descendants; those of earlier tests are not the launcher's."""
    descendants, earlier = children.descendants, set(children.descendants())
    monkeypatch.setattr(
        children, "descendants", lambda: [p for p in descendants() if p not in earlier]
    )


def requests(**flags: bool) -> Any:
    return SimpleNamespace(**{"stop": False, "requeue": False, "kill": False, **flags})


def attend(
    script: str,
    folder: Path,
    asked: Any = None,
    job: supervisor.Job | None = None,
    seconds: float = 60,
) -> tuple[str, str]:
    """What went wrong, and the console's log."""
    command = [sys.executable, "-c", script]
    log = folder / "console.log"
    with log.open("wb", buffering=0) as console:
        error = supervisor._attend(command, folder, console, asked or requests(), job, seconds)
    return error, log.read_text()


def test_output_and_exit_code_are_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    error, log = attend("import sys; print('out'); print('err', file=sys.stderr)", tmp_path)
    assert (error, sorted(log.split())) == ("", ["err", "out"])
    assert sorted(capfd.readouterr().out.split()) == ["err", "out"]
    assert attend("raise SystemExit(3)", tmp_path)[0].endswith("ended with code 3")


def test_ranks_get_the_attempts_folder(tmp_path: Path) -> None:
    script = f"import os; print(os.environ[{outcome.VARIABLE!r}])"
    assert attend(script, tmp_path)[1].strip() == str(tmp_path)


def test_request_to_stop_is_passed_on(tmp_path: Path) -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (print('saved'), sys.exit(0)))\n"
        "time.sleep(60)"
    )
    # Until Python has set its handler, the signal would end the process.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        error, log = attend(script, tmp_path, requests(stop=True))
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert (error, log) == ("", "saved\n")


def test_request_to_end_kills_the_processes(tmp_path: Path) -> None:
    began = time.monotonic()
    error, _ = attend("import time; time.sleep(60)", tmp_path, requests(kill=True))
    assert time.monotonic() - began < 20 and "code -9" in error


@pytest.mark.parametrize(
    ("kinds", "ended"), [(("running", "failed"), "failed"), (("done", "done"), "done")]
)
def test_processes_that_survive_a_failed_rank_or_the_end_of_all_are_killed(
    kinds: tuple[str, ...], ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_END_SECONDS", 0.5)
    for rank, kind in enumerate(kinds):
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps({"kind": kind}))
    began = time.monotonic()
    error, _ = attend("import time; time.sleep(60)", tmp_path)
    assert 0.4 < time.monotonic() - began < 20 and "code -9" in error
    assert outcome.conclude(tmp_path, 1, 1, error).kind == ended


def test_processes_are_left_while_a_rank_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_END_SECONDS", 0.1)
    for rank, kind in enumerate(("running", "done")):
        (tmp_path / f"rank_{rank}.json").write_text(json.dumps({"kind": kind}))
    assert attend("import time; time.sleep(1.5)", tmp_path)[0] == ""


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_failures_without_progress_end_the_run(
    disk_is_full: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each attempt fails with another error, so that none is the repetition of the one before. A
    disk on which the launcher can record no outcome does not hide the reason."""
    if disk_is_full:
        monkeypatch.setattr(outcome, "_write", lambda *_: False)
    script = (
        "import sys, time\n"
        "from neftune_dist.distributed import outcome\n"
        "outcome.tell(0, outcome.FAILED, error=f'now it is {time.time()}')\n"
        "sys.exit(1)"
    )
    monkeypatch.setattr(supervisor, "_start", lambda *_: [sys.executable, "-c", script])
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    config, run_dir = Config(), tmp_path / "run"
    config.run_dir = str(run_dir)
    code = supervisor.launch(config, [], num_processes=1, max_restarts=1, minutes=1)
    assert code == outcome.EXIT_FAILED
    said = capfd.readouterr().out
    assert "the last 2 attempts published no new checkpoint" in said and "now it is" in said
    recorded = outcome.LOST if disk_is_full else outcome.FAILED
    assert [attempt.kind for attempt in outcome.outcomes(run_dir)] == [recorded] * 2


def test_node_that_does_not_start_is_named_after_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_END_SECONDS", 0.2)
    (tmp_path / "node_0").touch()
    job = supervisor.Job("17", ("n1", "n2"))
    began = time.monotonic()
    error, _ = attend("import time; time.sleep(60)", tmp_path, job=job, seconds=1.2)
    assert time.monotonic() - began >= 1.4  # the limit, and the time to end
    assert error == "n2 did not start within 0.02 minutes"
    (tmp_path / "node_1").touch()
    assert attend("import time; time.sleep(1)", tmp_path, job=job, seconds=0.1)[0] == ""


def test_exit_code_of_a_killed_command_is_kept() -> None:
    command = subprocess.Popen(["sleep", "30"])
    for _ in range(2):  # the second time it is dead, and not yet reaped
        supervisor._kill_all(command)
        deadline = time.monotonic() + 10
        while "(sleep) Z" not in Path(f"/proc/{command.pid}/stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert command.poll() == -signal.SIGKILL


@pytest.fixture
def adopting() -> Iterator[None]:
    """Orphans become children of this process, until the test's end: nobody would reap those of
    other tests."""
    children.adopt_orphans()
    yield
    children._LIBC.prctl(children._SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.usefixtures("adopting")
def test_orphans_of_the_command_are_killed(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'],\n"
        "    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)\n"
        "print(child.pid)"
    )
    _, log = attend(script, tmp_path)
    child, deadline = int(log), time.monotonic() + 10
    with contextlib.suppress(ChildProcessError):  # it was reaped as well
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                pytest.fail("the orphan goes on")
            time.sleep(0.05)


def test_descendants_are_found_over_generations() -> None:
    script = "import subprocess, sys; subprocess.run(['sleep', '30'])"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 10
        while len(found := set(children.descendants())) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert child.pid in found and len(found) >= 2 and os.getpid() not in found
    finally:
        for process in children.descendants():
            os.kill(process, signal.SIGKILL)
        child.wait()


def test_lost_output_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes no block; what it missed is said once it takes one again."""
    blocks, answers = [b"one", b"two", b"three"], [3, 3, 0, 0, 0]
    written: list[bytes] = []

    def write(descriptor: int, block: bytes) -> int:
        if descriptor == 1:
            return 0
        left = answers.pop(0)
        written.append(block if not left else b"")
        return left

    monkeypatch.setattr(supervisor, "_unwritten", write)
    monkeypatch.setattr(supervisor.os, "read", lambda *_: blocks.pop(0) if blocks else b"")
    console = SimpleNamespace(fileno=lambda: 9)
    supervisor._copy(console, console)  # type: ignore[arg-type]
    note = b"\n(neftune-dist: 3 bytes of output are missing here)\n"
    assert b"".join(written) == b"two" + note + b"three"


def test_words_of_the_command_for_every_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEFTUNE_DIST_PYTHON", "/container/python")
    monkeypatch.setenv("NEFTUNE_DIST_CONTAINER", "apptainer exec 'my image.sif'")
    monkeypatch.setenv("NEFTUNE_DIST_SRUN_OPTIONS", "--mpi=none")
    alone = supervisor._start(None, 4, 15)
    assert alone[:4] == list(supervisor._IGNORING_USR1)
    assert alone[4:7] == ["apptainer", "exec", "my image.sif"]
    assert alone[7:11] == ["/container/python", "-m", "neftune_dist", "node"]
    assert alone[11:] == ["--processes", "4", "--rendezvous-minutes", "15"]
    job = supervisor.Job("17", ("n1", "n2", "n3"))
    step = supervisor._start(job, 4, 15)
    assert step[0] == "srun" and "--nodes=3" in step and "--ntasks=3" in step
    assert step.index("--mpi=none") < step.index("bash")
    assert f"--wait={supervisor._END_SECONDS:.0f}" in step


_FORGOTTEN = "Slurm knows no such job"


@pytest.mark.parametrize(
    ("variables", "programs", "lack"),
    [
        ({"SLURM_JOB_NODELIST": ""}, ("srun", "scontrol"), "SLURM_JOB_NODELIST names no node"),
        ({"SLURM_JOB_NODELIST": "n[1-2]"}, (), "srun and scontrol are not here"),
        ({"SLURM_JOB_NODELIST": "n[1-2]"}, ("srun", "scontrol"), ""),
        (
            {"SLURM_JOB_NODELIST": "n[1-2]", "SAYS": "Invalid job id"},
            ("srun", "scontrol"),
            _FORGOTTEN,
        ),
    ],
)
def test_job_is_found_or_what_it_lacks_is_named(
    variables: dict[str, str],
    programs: tuple[str, ...],
    lack: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    for name, value in {"SLURM_JOB_ID": "7", "PATH": str(tmp_path), **variables}.items():
        monkeypatch.setenv(name, value)
    for name in programs:
        (tmp_path / name).write_text('#!/bin/sh\necho "$SAYS" >&2; exit 1\n')
        (tmp_path / name).chmod(0o755)
    if not lack:
        assert Job.find() == Job("7", ("n1", "n2"))
        return
    with pytest.raises(UserError, match=f"SLURM_JOB_ID=7, but {lack}: outside of a job, unset"):
        Job.find()


@pytest.mark.parametrize(("says", "kill"), [("Invalid job id specified", False), ("away", True)])
def test_job_that_slurm_forgot_or_that_is_to_end_at_once_is_not_requeued(
    says: str, kill: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "{says}" >&2; exit 1\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert not Job("7", ("n1",)).requeue(requests(kill=kill))


def test_node_whose_environment_is_wrong_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake, not a node that was lost: the job is not put back into the queue for it."""
    monkeypatch.delenv("NEFTUNE_DIST_HOSTS", raising=False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "two")
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path))
    before = signal.getsignal(signal.SIGUSR1)
    try:
        assert node.node(tmp_path, [], num_processes=0, minutes=1.0) == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    ended = outcome.conclude(tmp_path, 0, 0, "srun ended with code 1")
    assert ended.kind == outcome.MISTAKE and "SLURM_GPUS_ON_NODE='two'" in ended.error


def test_ranks_that_torchrun_kills_are_not_reported_as_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that wait on a GPU for one that died end half a minute later, by torchrun's SIGKILL."""
    failures = {}
    for rank, code, second in ((3, -signal.SIGSEGV, 100), (0, -9, 130), (1, -9, 130)):
        failures[rank] = ProcessFailure(rank, 0, code, error_file="")
        failures[rank].timestamp = second

    def fail(*_: object) -> None:
        raise node.ChildFailedError("train", failures)

    monkeypatch.setattr(node, "torchrun", fail)
    monkeypatch.setenv(outcome.VARIABLE, str(tmp_path))
    assert node._torchrun([], "", 0, 0) == outcome.EXIT_FAILED
    assert [path.name for path in tmp_path.iterdir()] == ["rank_3.json"]
    assert capfd.readouterr().err.count("died") == 1


def test_mistake_in_the_environment_is_no_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts without a new checkpoint are counted, and given up after some."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("NEFTUNE_DIST_CONTAINER", "apptainer exec 'my image")
    monkeypatch.setattr(supervisor, "Requests", requests)
    config = Config(run_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"NEFTUNE_DIST_CONTAINER=.* cannot be read"):
        supervisor.launch(config, [], num_processes=1, max_restarts=3, minutes=1.0)
    assert outcome.outcomes(tmp_path) == []
