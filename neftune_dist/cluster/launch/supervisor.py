"""Looks after a run: starts it on this node, or on all nodes of a Slurm job, and restarts it.

Owns requests to stop, and whether a run that ended goes on: here, later, or not at all. It imports
no torch, so that it can stand outside the container that holds it.

    launch       one attempt after another, until the run is done or nothing is left to try
      node       on every node: meets the others in the attempt's folder, then runs torchrun
        train    on every rank

SIGUSR1 means "save and stop". All between `launch` and the ranks ignore it, so that only the ranks
hear it; a rank that is still being started ignores it too, therefore it is sent until they end.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from neftune_dist.cluster.launch.rendezvous import missing_hosts
from neftune_dist.config import Config, UserError, user_path
from neftune_dist.distributed import environment, outcome
from neftune_dist.system import children, storage
from neftune_dist.system.checkpoint_names import newest_step, run_claim
from neftune_dist.system.records import STEPS, read_records

_POLL_SECONDS = 0.2
_SIGNAL_EVERY_SECONDS = 3.0
_LOOK_EVERY_SECONDS = 5.0
# Time of the processes, once a rank has failed or all have ended, before they are killed.
_END_SECONDS = 60.0
# How long a batch script that was requeued waits to be ended by Slurm.
_REQUEUED_SECONDS = 300.0
# How long the nodes take to report to a controller that was away which steps have ended.
_SETTLE_SECONDS = 60.0
# What scontrol says of a job that is none; after other errors it may answer later.
_UNKNOWN = "Invalid job id"
_IGNORING_USR1 = ("bash", "-c", 'trap "" USR1; exec "$@"', "ignoring-usr1")


@dataclass(frozen=True)
class Job:
    """The Slurm job whose batch script this process is.

    Attributes:
        number: the job's id, or that of an array's task.
        hosts: names of its nodes.
    """

    number: str
    hosts: tuple[str, ...]

    @staticmethod
    def find() -> Job | None:
        """The job, or None outside one; within a step (`srun --pty`), the node is used as it is."""
        number = os.environ.get("SLURM_JOB_ID")
        if not number or "SLURM_STEP_ID" in os.environ:
            return None
        hosts = environment.expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))
        job, lack = Job(number, tuple(hosts)), ""
        if not hosts:
            lack = "SLURM_JOB_NODELIST names no node"
        elif not (shutil.which("srun") and shutil.which("scontrol")):
            lack = "srun and scontrol are not here"
        elif _UNKNOWN in job._scontrol("show", "job").stderr:
            lack = "Slurm knows no such job"
        if lack:
            raise UserError(
                f"The environment says SLURM_JOB_ID={number}, but {lack}: outside of a job, unset "
                "SLURM_JOB_ID."
            )
        return job

    def requeue(self, requests: Requests) -> bool:
        """Put the job back into the queue, which ends this process within seconds; False where that
        is refused, or where this process is asked to end at once."""
        away = False
        while (shown := self._scontrol("show", "job")).returncode and _UNKNOWN not in shown.stderr:
            if requests.kill:
                return False
            _say("Slurm's controller does not answer")
            away = True
            time.sleep(_POLL_SECONDS * 25)
        if away:
            # The nodes are still telling it that the step has ended; a node that is asked to end
            # it again meanwhile is drained, as one whose processes cannot be killed.
            time.sleep(_SETTLE_SECONDS)
        done = self._scontrol("requeue")
        if done.returncode:
            _say(f"not requeued: {done.stderr.strip()}")
        return done.returncode == 0

    def _scontrol(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["scontrol", *words, self.number], capture_output=True, text=True)


class Requests:
    """Signals to this process: the first asks for a save and a stop, a second Ctrl-C for the end.

    Attributes:
        stop: asked to stop.
        requeue: asked by SIGUSR1, which Slurm sends before the time limit.
        kill: asked to end at once.
    """

    def __init__(self) -> None:
        self.stop = self.requeue = self.kill = False
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.kill = self.kill or (self.stop and number == signal.SIGINT)
        self.requeue = self.requeue or number == signal.SIGUSR1
        self.stop = True


def launch(
    config: Config, words: Sequence[str], *, num_processes: int, max_restarts: int, minutes: float
) -> int:
    """Run `neftune-dist train` with `words` to its end; the exit code.

    Args:
        config: the configuration that `words` give.
        words: arguments of `train`.
        num_processes: on each node; 0: one a GPU, or one where there is none.
        max_restarts: attempts in a row without a new checkpoint before it gives up.
        minutes: how long nodes wait for each other.

    Raises:
        UserError: the run directory cannot be written, or another launch is at work in it.
    """
    run_dir = user_path(config.run_dir, "run_dir").absolute()
    storage.check_claim(*run_claim(run_dir))  # no log is written where `train` would write nothing
    with storage.writing(f"run_dir={run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
    busy = f"run_dir={run_dir} is in use by another launch, which goes on."
    with storage.hold(run_dir / ".launch.lock", busy, seconds=2.0):
        requests, job = Requests(), Job.find()
        start = _start(job, num_processes, minutes)
        # Orphans of a process that was killed become children of this one, which ends them.
        children.adopt_orphans()
        words, going_on = [*words], environment.number("SLURM_RESTART_COUNT", 0) > 0
        while True:
            if going_on and newest_step(run_dir):
                # `never`, or another run's checkpoint, applied to the first start.
                words.append("checkpoint.resume=auto")
            going_on = True
            with storage.writing(f"run_dir={run_dir}"):
                folder = outcome.begin(run_dir)
            _say(f"{folder.name} of {run_dir}, output of all ranks in {folder}")
            command = [*start, str(folder), "--", *words]
            with (folder / "console.log").open("wb", buffering=0) as console:
                error_text = _attend(command, folder, console, requests, job, minutes * 60)
            steps, published = _last_step(run_dir), newest_step(run_dir)
            ended = outcome.conclude(folder, steps, published, error_text)
            if requests.kill:
                _say(f"ended at once; the newest checkpoint is that of step {published}", folder)
                return 128 + signal.SIGINT
            past = outcome.outcomes(run_dir, folder)[:-1]  # whose last may not have been written
            verdict = outcome.verdict([*past, ended], max_restarts)
            if not verdict.again:
                _say(f"{verdict.reason.rstrip('.')}; see {folder}", folder)
                return verdict.code
            elsewhere = ended.kind in (outcome.STOPPED, outcome.LOST) or requests.stop
            if not elsewhere:
                _say(f"{verdict.reason}; starting again from step {published}", folder)
                continue
            ours = requests.requeue or not requests.stop
            if job and ours and job.requeue(requests):
                _say(f"{verdict.reason}; requeued, to go on from step {published}", folder)
                time.sleep(_REQUEUED_SECONDS)
                return verdict.code
            _say(f"{verdict.reason}; the same command goes on from step {published}", folder)
            return verdict.code


def _say(line: str, folder: Path | None = None) -> None:
    """Print a line, and add it to the log of the attempt in `folder`, whose end it states."""
    print(f"neftune-dist: {line}", flush=True)
    if folder:
        with contextlib.suppress(OSError), (folder / "console.log").open("a") as console:
            console.write(f"neftune-dist: {line}\n")


def _start(job: Job | None, num_processes: int, minutes: float) -> list[str]:
    """The command that starts `node` on every node, but for its folder and the words of `train`."""
    python = os.environ.get("NEFTUNE_DIST_PYTHON", sys.executable)
    options = ["--processes", str(num_processes), "--rendezvous-minutes", str(minutes)]
    node = [python, "-m", "neftune_dist", "node", *options]
    run = [*_IGNORING_USR1, *_listed("NEFTUNE_DIST_CONTAINER"), *node]
    if job is None:
        return run
    number = str(len(job.hosts))
    return [
        "srun",
        f"--nodes={number}",
        f"--ntasks={number}",
        "--ntasks-per-node=1",
        # The ranks of the other nodes may still report their error, but not for ever.
        "--kill-on-bad-exit=0",
        f"--wait={_END_SECONDS:.0f}",
        # The task is torchrun, whose ranks share the node's cores; Slurm would bind it to one.
        "--cpu-bind=none",
        *_listed("NEFTUNE_DIST_SRUN_OPTIONS"),
        *run,
    ]


def _listed(variable: str) -> list[str]:
    """The words in an environment variable, quoted as in a shell."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{variable}={text} cannot be read: {error}.") from error


def _attend(
    command: list[str],
    folder: Path,
    console: IO[bytes],
    requests: Requests,
    job: Job | None,
    seconds: float,
) -> str:
    """Run `command` to its end and pass requests on; return the failure, empty where there is none.

    Args:
        seconds: in which all nodes must have started it.
    """
    hosts = job.hosts if job else [socket.gethostname()]
    own = {outcome.VARIABLE: str(folder), "NEFTUNE_DIST_HOSTS": ",".join(hosts)}
    try:
        # In another session: Ctrl-C comes to this process alone, which asks the ranks to save.
        process = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=children.ended_with_parent(),
        )
    except OSError as error:
        return f"{command[0]} cannot be started: {error.strerror}"
    assert process.stdout is not None
    copying = threading.Thread(target=_copy, args=(process.stdout, console), daemon=True)
    copying.start()
    began = time.monotonic()
    signalled, looked, over_at, late = 0.0, 0.0, None, ""
    while process.poll() is None:
        now = time.monotonic()
        if requests.stop and now - signalled > _SIGNAL_EVERY_SECONDS:
            signalled = now
            _ask_to_stop(process.pid, job)
        if now - looked > _LOOK_EVERY_SECONDS:  # at a file a rank, on a network's file system
            looked = now
            over_at = over_at or (now if outcome.is_over(folder) else None)
            # Slurm may let srun wait for ever, for a node that came back before it was missed.
            overdue = now - began > seconds + _END_SECONDS
            if job and overdue and (missing := missing_hosts(folder, job.hosts)):
                late = f"{', '.join(missing)} did not start within {seconds / 60:g} minutes"
        if requests.kill or late or (over_at and now - over_at > _END_SECONDS):
            _kill_all(process)
        time.sleep(_POLL_SECONDS)
    _kill_all(process)  # processes that outlived it
    copying.join(10)
    if process.returncode == 0 or late:
        return late
    return f"{Path(command[0]).name} ended with code {process.returncode}"


def _copy(source: IO[bytes], console: IO[bytes]) -> None:
    """Pass output on to the log and to this process's own. Whatever becomes of them, the pipe is
    drained: a rank that prints must not wait for a full disk or for a reader that has gone."""
    lost = 0
    while block := os.read(source.fileno(), 1 << 16):
        note = b"\n(neftune-dist: %d bytes of output are missing here)\n" % lost
        if lost and not _unwritten(console.fileno(), note):
            lost = 0
        lost += _unwritten(console.fileno(), block)
        _unwritten(1, block)


def _unwritten(descriptor: int, block: bytes) -> int:
    """Write a block; how many bytes of it could not be written."""
    left = memoryview(block)
    with contextlib.suppress(OSError):
        while left:
            left = left[os.write(descriptor, left) :]
    return len(left)


def _ask_to_stop(pid: int, job: Job | None) -> None:
    # srun passes the signal on to all processes of the step.
    for process in [pid] if job else children.descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGUSR1)


def _kill_all(command: subprocess.Popen[bytes]) -> None:
    """Kill all descendants, and reap the adopted orphans among them."""
    for process in children.descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        if process != command.pid:  # whose exit code is read by `poll`, once
            with contextlib.suppress(ChildProcessError):  # a child of another process
                os.waitpid(process, os.WNOHANG)


def _last_step(run_dir: Path) -> int:
    """The last recorded step; 0 where there is none."""
    with contextlib.suppress(OSError):
        if rows := read_records(run_dir / STEPS, last_bytes=2**16).rows:
            return int(rows[-1]["step"])
    return 0
