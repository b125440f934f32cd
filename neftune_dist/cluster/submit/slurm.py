"""Slurm as seen from a login node: the options of a submission, partitions, jobs in the queue.

Runs Slurm's commands and reads their output. A request that no partition can meet is a
`UserError`. Imports no torch.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from neftune_dist.arguments import MAX_RESTARTS, RENDEZVOUS_MINUTES, argument, bounded, flag
from neftune_dist.config import UserError

_ANSWER_SECONDS = 20.0  # the controller may be busy, or away
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_RANGE = re.compile(r"(\d+)(?:-(\d+)(?::([1-9]\d*))?)?", re.ASCII)
# Jobs, tasks of arrays, parts of heterogeneous jobs; of `after`, minutes later.
_JOBS = r"[1-9]\d*(_\d+|_\*|\+\d+)?"
_CONDITION = rf"singleton|(after(any|burstbuffer|corr|notok|ok)?:)?{_JOBS}(:{_JOBS})*"
_DEPENDENCY = re.compile(rf"({_CONDITION})([,?]({_CONDITION}))*", re.ASCII | re.IGNORECASE)
_MOST_TASKS = 1000
# The folder that holds slurm/ and that the nodes see, too: the repository, or where the package was
# installed without one the user's own.
_CHECKOUT = Path(__file__).resolve().parents[3]
_SITE = Path("slurm", "site.sh")
ROOT = _CHECKOUT if (_CHECKOUT / _SITE).is_file() else Path.cwd()
PASSED_ON = ("cpus-per-task", "mem", "partition", "account", "qos", "constraint", "exclude")
_NUMBER = bounded(int, 1, 2**16)
OPTIONS = (
    argument("--nodes", type=_NUMBER, required=True, metavar="N", help="number of nodes"),
    argument("--gpus-per-node", metavar="[TYPE:]G", help="GPUs of each node, one rank per GPU"),
    argument(
        "--processes",
        type=_NUMBER,
        metavar="P",
        help="CPU ranks of each node, in place of --gpus-per-node",
    ),
    argument(
        "--time", required=True, metavar="HH:MM:SS", help="time limit; the run saves before it"
    ),
    *(argument(f"--{name}", help="passed on to sbatch") for name in PASSED_ON),
    argument("--job-name", help="default: the run directory's name"),
    argument(
        "--mail", metavar="ADDRESS", help="mail when the job begins, ends, fails or is requeued"
    ),
    argument(
        "--array",
        metavar="SPEC",
        help="one run per index (0-3 or 1,5 or 0-9%%2); {} in settings becomes the index",
    ),
    argument("--dependency", metavar="LIST", help="as sbatch: afterok:123"),
    argument(
        "--chain",
        type=_NUMBER,
        default=1,
        metavar="N",
        help="submit N jobs, each of which continues the one before",
    ),
    argument(
        "--signal-seconds",
        type=bounded(int, 1, 65535),  # of Slurm
        default=300,
        help="seconds before the time limit to save in; default: %(default)s",
    ),
    MAX_RESTARTS,
    RENDEZVOUS_MINUTES,
    argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, such as exclusive or gres=...",
    ),
    flag("--dry-run", "check and print; write and queue nothing"),
)


def adopt_site() -> None:
    """Take the settings of the hub from slurm/site.sh, as the job will. huggingface_hub reads them
    once, when it is imported."""
    if not (ROOT / _SITE).is_file():
        raise UserError(f"{ROOT} has no {_SITE}: neftune-dist init --slurm writes it.")
    command = ["/bin/bash", "-c", f". {_SITE} >/dev/null 2>&1; /usr/bin/env -0"]
    sourced = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in sourced.stdout.split("\0"):
        name, _, value = line.partition("=")
        if name.startswith(("HF_", "XDG_CACHE_HOME")):
            os.environ[name] = value


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


def check_options(given: argparse.Namespace) -> None:
    """Refuse values that make no sense; adds `per_node`, the ranks on each node."""
    gpus = given.gpus_per_node
    if (gpus is None) == (given.processes is None):
        raise UserError("--gpus-per-node or --processes is needed, and only one of them.")
    if gpus is not None and not re.fullmatch(r"([\w.-]+:)?[1-9]\d{0,3}", gpus, re.ASCII):
        raise UserError(f"--gpus-per-node={gpus} is not of the form 8 or h100:8.")
    if given.dependency and not _DEPENDENCY.fullmatch(given.dependency):
        raise UserError(
            f"--dependency={given.dependency} is no list of conditions that sbatch knows: write "
            "afterok:123, afterany:123:124, singleton and so on, separated by commas."
        )
    given.per_node = given.processes or int(given.gpus_per_node.rpartition(":")[2])
    if given.signal_seconds >= seconds("--time", given.time):
        raise UserError(
            f"--signal-seconds={given.signal_seconds}, in which the run saves before its limit, "
            f"must be less than --time={given.time}."
        )
    own = [name.replace("_", "-") for name in vars(given)]
    own += ["ntasks-per-node", "signal", "open-mode", "output", "chdir", "mail-user"]
    for option in given.sbatch:
        match = re.fullmatch(r"(?:--)?([a-z][a-z-]*)(=.*)?", option)
        if not match:
            raise UserError(f"--sbatch={option} is no long option such as exclusive or mem=0.")
        for name in own:
            if name.startswith(match[1]):  # sbatch takes options by their beginnings, too
                raise UserError(f"--sbatch={option}: --{name} is an option of submit.py itself.")
