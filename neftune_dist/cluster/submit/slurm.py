"""Slurm as seen from a login node: partitions, and jobs in the queue.

Runs Slurm's commands and reads their output. A request that no partition can meet is a
`UserError`. Imports no torch.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Iterable, Sequence

from neftune_dist.config import UserError

_ANSWER_SECONDS = 20.0  # the controller may be busy, or away
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?")
_MOST_TASKS = 1000


class SlurmUnavailable(UserError):
    """Slurm is not on this machine, or does not answer."""


def run(
    *command: str, script: str = "", timeout: float | None = _ANSWER_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run one of Slurm's commands.

    Args:
        script: for its standard input.
        timeout: in seconds; None: it may take as long as it wants.

    Raises:
        SlurmUnavailable: it is missing, or the controller does not answer.
    """
    # Submitted from within a step of another job, a job would inherit what says it is that step;
    # and people set other formats.
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SQUEUE_", "SINFO_")) or name in kept
    }
    try:
        return subprocess.run(
            command, env=environment, input=script, capture_output=True, text=True, timeout=timeout
        )
    except FileNotFoundError:
        raise SlurmUnavailable(
            f"{command[0]} was not found: submit from a node that has Slurm."
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailable(f"Slurm does not answer ({command[0]}): try again later.") from None


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Join the lines of a command's standard error, which may hold the site's own, into one."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in done.stderr.splitlines()]
    return "; ".join(line.rstrip(".") for line in lines if line) or "no reason given"


def seconds(what: str, text: str) -> float:
    """A time as Slurm writes it: minutes, min:sec, hours:min:sec, days-hours[:min[:sec]]; infinite
    where there is no limit."""
    if text.lower() in ("infinite", "unlimited"):
        return math.inf
    match = _TIME.fullmatch(text)
    if not match:
        raise UserError(f"{what}={text} is no time: write HH:MM:SS or DAYS-HH:MM:SS.")
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, remainder = (*parts, 0, 0)[:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + remainder
    return float(total) or math.inf  # 0 asks for no limit


def indices(array: str) -> list[int]:
    """The indices of an array: 0-3, 1,5 or 0-10:2, with or without %N at its end."""
    found: set[int] = set()
    for part in re.sub(r"%[1-9]\d*$", "", array).split(","):
        match = _RANGE.fullmatch(part)
        if not match:
            raise UserError(f"--array={array} is not of the form 0-3, 1,5 or 0-9%2.")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        found.update(range(first, min(last, first + _MOST_TASKS * step) + 1, step))
    if not 1 <= len(found) <= _MOST_TASKS:
        raise UserError(f"--array={array} does not name 1 to {_MOST_TASKS} tasks.")
    return sorted(found)


def check_partition(partition: str | None, nodes: int, gpus: str | None, time: str) -> None:
    """Refuse requests that no named partition, or the default one, can ever meet.

    Args:
        partition: one or several, separated by commas; None: the default one.
        nodes: their number.
        gpus: on each node: 8, or h100:8.
        time: the limit asked for.
    """
    listed = run("sinfo", "--all", "--noheader", "--format=%P|%D|%l|%G")
    if listed.returncode:
        raise SlurmUnavailable(f"sinfo failed: {reason(listed)}.")
    rows = [line.split("|") for line in listed.stdout.splitlines()]
    default = next((row[0].rstrip("*") for row in rows if row[0].endswith("*")), "")
    names = (partition or os.environ.get("SBATCH_PARTITION") or default).split(",")
    flaws = [_flaw(name, rows, nodes, gpus, time) for name in names if name]
    if flaws and None not in flaws:  # with several, the job runs wherever it can
        raise UserError(str(flaws[0]))


def _flaw(
    name: str, rows: Iterable[Sequence[str]], nodes: int, gpus: str | None, time: str
) -> str | None:
    own = [row for row in rows if row[0].rstrip("*") == name]
    if not own:
        known = ", ".join(sorted({row[0].rstrip("*") for row in rows}))
        return f"--partition={name} is not known; there are: {known}."
    total, limit = sum(int(row[1]) for row in own), own[0][2]
    if nodes > total:
        return f"--nodes={nodes}, but the partition {name} has {total}."
    if seconds("--time", time) > seconds(f"the limit of {name}", limit):
        return (
            f"--time={time} is above the limit of the partition {name}: ask for {limit}, at the "
            "end of which the job saves and goes back into the queue, or for --chain N such jobs."
        )
    if gpus:
        kind, _, wanted = gpus.rpartition(":")
        pattern = rf"\bgpu:{re.escape(kind)}:(\d+)" if kind else r"\bgpu:(?:[^:,()]+:)?(\d+)"
        fit = [row for row in own if sum(map(int, re.findall(pattern, row[3]))) >= int(wanted)]
        if nodes > (total := sum(int(row[1]) for row in fit)):
            there = ", ".join(sorted({f"{row[1]} with {row[3]}" for row in own}))
            return (
                f"--nodes={nodes} --gpus-per-node={gpus}, but the partition {name} has {total} "
                f"such nodes: {there}."
            )
    return None


def queued(ids: Sequence[str]) -> list[tuple[str, str]]:
    """Return the jobs, or tasks of arrays (12_3), that have not ended, and their states."""
    if not ids:
        return []
    listed = run("squeue", "--noheader", "--array", f"--jobs={','.join(ids)}", "--format=%i %T")
    if listed.returncode and "nvalid job id" not in listed.stderr:  # ended long ago
        raise UserError(f"squeue failed: {reason(listed)}.")
    found = (line.split() for line in listed.stdout.splitlines())
    return [(number, state.lower()) for number, state in found]


def after(ids: Sequence[str]) -> str:
    """The dependency of a job that begins when these have ended, however they did."""
    return f"afterany:{':'.join(ids)}"


def filled(pattern: str, **symbols: str) -> str:
    """Fill in the symbols (%j, %a) of an output file's name."""
    return re.sub("%(.)", lambda match: {"%": "%", **symbols}.get(match[1], match[0]), pattern)
