"""One attempt at a run: the folder where its ranks leave their output and how they ended.

Each start of a run's processes is an attempt, under `RUN_DIR/logs/attempt_0001` and so on. Ranks
record there how they ended, because torchrun turns every exit code into its own; from the records
`verdict` decides whether the run is started again. Imports no torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from neftune_dist.config import UserError, read_json
from neftune_dist.distributed import environment
from neftune_dist.system import storage

EXIT_DONE, EXIT_FAILED, EXIT_MISTAKE, EXIT_STOPPED = 0, 1, 2, 75
RUNNING = "running"  # and, at the end, of a rank that was killed or crashed
DONE, STOPPED, MISTAKE, FAILED = "done", "stopped", "mistake", "failed"
FINAL = "final"  # a failure that another start would only repeat
ORPHANED = "orphaned"  # failed because another rank had gone
LOST = "lost"  # a machine died, or did not come
# Given to the ranks by the launcher: the attempt's folder.
VARIABLE = "NEFTUNE_DIST_ATTEMPT"
_NAME = re.compile(r"attempt_\d{4,}", re.ASCII)
_RANK = re.compile(r"rank_(\d+)\.json")
_OUTCOME = "outcome.json"
# Time for a full disk to get room again, before the record of an outcome is given up.
_FULL_SECONDS = 30.0
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


class Final(RuntimeError):
    """A failure of all ranks that another start would only repeat; its text is for the user."""


@dataclass(frozen=True)
class Outcome:
    """The end of a rank, or of an attempt as a whole.

    Attributes:
        kind: running | done | stopped | mistake | failed | final | orphaned | lost.
        step: updates made by then.
        error: one line; empty where there was none.
        checkpoint: the newest published step when the attempt had ended.
        when: seconds since 1970; 0 where it is not recorded.
    """

    kind: str
    step: int = 0
    error: str = ""
    checkpoint: int = 0
    when: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The decision after an attempt.

    Attributes:
        again: start again.
        code: the exit code otherwise.
        reason: in a sentence.
    """

    again: bool
    code: int
    reason: str


def folder_of_run(run_dir: Path) -> Path:
    """Return the folder for this process's logs and reports, which need not exist.

    It is the attempt's, or the run's `logs/` where no launcher made one.
    """
    given = os.environ.get(VARIABLE)
    return Path(given) if given else run_dir / "logs"


def begin(run_dir: Path) -> Path:
    """Make the next attempt's folder. Raises `OSError`."""
    logs = run_dir / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    number = max(map(_number, folders(run_dir)), default=0)
    while True:
        number += 1
        folder = logs / f"attempt_{number:04d}"
        with suppress(FileExistsError):  # of another job, at the same time
            folder.mkdir()
            return folder


def folders(run_dir: Path) -> list[Path]:
    """The attempts' folders, the oldest first."""
    found = (run_dir / "logs").glob("attempt_*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("attempt_"))


def tell(rank: int, kind: str, step: int = 0, error: str = "") -> bool:
    """Record where this rank is or how it ended, where a launcher asks for it.

    The record of a failure is not replaced.

    Args:
        rank: this process's.
        kind: see `Outcome`.
        step: updates made by now.
        error: only its first line is kept.

    Returns:
        Whether a launcher can read it.
    """
    given = os.environ.get(VARIABLE)
    if not given:
        return False
    line = error.strip().splitlines()[0] if error.strip() else ""
    path = Path(given) / f"rank_{rank}.json"
    before = _read(path)
    if before is None or before.kind == RUNNING:
        return _write(path, Outcome(kind, step, line, when=time.time()))
    return True


@contextmanager
def reported() -> Iterator[Callable[[str], object]]:
    """Under a launcher, keep this rank's output in the attempt's folder, and record there how the
    block ends. A mistake, and the loss of another rank, end the process without a traceback: the
    launcher says the cause, once for all ranks."""
    rank = environment.number("RANK", 0)
    folder = os.environ.get(VARIABLE)
    if folder and rank:  # the launcher keeps what reaches the console, which is rank 0's
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        log = os.open(Path(folder) / f"rank_{rank}.log", flags, 0o666)
        for stream in (1, 2):
            os.dup2(log, stream)
    tell(rank, RUNNING)
    try:
        yield lambda kind: tell(rank, kind)
    except (UserError, Final) as error:
        if not tell(rank, FINAL if isinstance(error, Final) else MISTAKE, error=str(error)):
            raise
        # Where all ranks leave by it, it is no failure for torchrun.
        shared = isinstance(error, Final) or error.shared or environment.number("WORLD_SIZE", 1) < 2
        sys.exit(EXIT_DONE if shared else EXIT_MISTAKE)
    except BaseException as error:
        kind = _kind(error)
        if tell(rank, kind, error=f"{type(error).__name__}: {error}") and kind == ORPHANED:
            print(f"neftune-dist: rank {rank} lost another: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_FAILED)
        raise


def _kind(error: BaseException) -> str:
    # torch and gloo mark the loss of the other side by the text of the error alone.
    lost = ("onnection closed by peer", "onnection reset by peer", "Broken pipe")
    if isinstance(error, ConnectionError) or any(words in str(error) for words in lost):
        return ORPHANED
    return FAILED


def conclude(folder: Path, step: int, checkpoint: int, error: str) -> Outcome:
    """Sum up the records of the ranks; write and return the outcome.

    Args:
        folder: of the attempt.
        step: the last one that was recorded.
        checkpoint: the newest published step.
        error: the launcher's own observation; empty where its command ended well.

    Raises:
        UserError: somebody has removed the folder.
    """
    by_rank = _by_rank(folder)
    if not folder.is_dir():
        raise removed(folder.parents[1])
    kind, cause = _cause(by_rank, error)
    outcome = Outcome(kind, step, cause, checkpoint, time.time())
    _write(folder / _OUTCOME, outcome)
    return outcome


def _cause(by_rank: dict[int, Outcome], error: str) -> tuple[str, str]:
    """The kind of the end, and its cause."""
    for kind in (FINAL, MISTAKE, LOST, FAILED):
        # The first is the cause, the others follow from it.
        of_kind = [end for end in by_rank.values() if end.kind == kind]
        if of_kind:
            return kind, of_kind[0].error
    silent = sorted(rank for rank, end in by_rank.items() if end.kind == RUNNING)
    if silent:
        who = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
        return FAILED, f"{who} died without a report: killed from outside, or crashed"
    orphans = [end for end in by_rank.values() if end.kind == ORPHANED]
    if orphans:
        return FAILED, orphans[0].error
    if not by_rank:
        return LOST, error or "no rank was started"
    # All is saved: the exit codes of the processes do not matter.
    stopped = any(end.kind == STOPPED for end in by_rank.values())
    return (STOPPED if stopped else DONE), ""


def is_over(folder: Path) -> bool:
    """Whether a rank has recorded a failure, which the others may not survive, or all their end."""
    kinds = {end.kind for end in _by_rank(folder).values()}
    return bool(kinds - {RUNNING, DONE, STOPPED}) or (bool(kinds) and RUNNING not in kinds)


def outcomes(run_dir: Path, last: Path | None = None) -> list[Outcome]:
    """Return the outcomes of the run's attempts, the oldest first.

    Args:
        last: the folder of the caller's own, with which they end; None: all. A later one is
            another launcher's, which was refused because the run is in use.
    """
    found = folders(run_dir)
    if last is not None:
        found = found[: found.index(last) + 1]
    return [_read(path / _OUTCOME) or Outcome(LOST) for path in found]


def verdict(past: Sequence[Outcome], max_restarts: int) -> Verdict:
    """Decide what follows the last of `past`.

    An attempt that published a newer checkpoint than all before it got somewhere; of those that
    did not, `max_restarts` in a row are allowed. A failure at the same step with the same error as
    the one before it is not tried a third time. Mistakes before the last, as of another launcher
    that was refused, say nothing of the run.
    """
    last = past[-1]
    past = [attempt for attempt in past[:-1] if attempt.kind != MISTAKE] + [last]
    if last.kind == DONE:
        return Verdict(False, EXIT_DONE, "the run is done")
    if last.kind in (MISTAKE, FINAL):
        code = EXIT_MISTAKE if last.kind == MISTAKE else EXIT_FAILED
        return Verdict(False, code, last.error)
    code = EXIT_STOPPED if last.kind == STOPPED else EXIT_FAILED
    what = "stopped" if last.kind == STOPPED else f"failed after step {last.step}: {last.error}"
    ends = [(attempt.kind, attempt.step, attempt.error) for attempt in past[-2:]]
    if last.kind == FAILED and len(ends) == 2 and ends[0] == ends[1]:
        return Verdict(False, code, f"{what}; twice the same, so it is not tried again")
    best = fruitless = 0
    for attempt in past:
        fruitless = 0 if attempt.checkpoint > best else fruitless + 1
        best = max(best, attempt.checkpoint)
    if fruitless > max_restarts:
        why = f"{what}; the last {fruitless} attempts published no new checkpoint"
        return Verdict(False, EXIT_FAILED, why)
    return Verdict(True, code, what)


def removed(run_dir: Path) -> UserError:
    """For a run that finds its directory gone."""
    return UserError(
        f"run_dir={run_dir} was removed or renamed while the run was going on: all steps since "
        "its last checkpoint are lost; the same command begins again, or goes on where the "
        "directory is back in its place."
    )


def _by_rank(folder: Path) -> dict[int, Outcome]:
    """The records of the ranks, in the order in which they were written."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:  # it has been removed, or its disk is away
        return {}
    found = (_RANK.fullmatch(name) for name in names)
    read = []
    for path, rank in ((folder / m[0], int(m[1])) for m in found if m):
        with suppress(OSError):
            if end := _read(path):
                # Nodes' clocks differ: a file's time is the file server's.
                read.append((path.stat().st_mtime, end.when, rank, end))
    return {rank: end for *_, rank, end in sorted(read, key=lambda row: row[:3])}


def _write(path: Path, outcome: Outcome) -> bool:
    """Report the outcome, or go without: no run ends because its end cannot be written down.
    Return whether it is written."""
    deadline = time.monotonic() + _FULL_SECONDS
    while True:
        try:
            storage.write(path, json.dumps(asdict(outcome)))
        except OSError as error:
            if error.errno in _PASSING and time.monotonic() < deadline:
                time.sleep(0.5)
                continue
            print(f"warning: {path}: {error.strerror}", file=sys.stderr, flush=True)
            return False
        return True


def _read(path: Path) -> Outcome | None:
    try:
        outcome: Outcome = read_json(path, Outcome)
    except UserError:
        return None
    return outcome
