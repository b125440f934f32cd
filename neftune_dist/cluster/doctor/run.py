"""`neftune-dist doctor`: each machine is checked by its first rank, then the ranks together.

    all ranks meet                      who does not come is named
    the first of each host              software, GPUs, memory, disk, hub
    the first of each host, together    shared run directory, clocks
    all ranks                           collectives
    rank 0                              the table and the exit code, with which all ranks leave

Nothing is raised and nothing waits without end: what goes wrong is a row of the table. Torch is
imported by the checks that need it, so that a broken one is such a row, too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from neftune_dist.cluster.doctor import collectives, conflicts, gpus, machine, nodes, software
from neftune_dist.cluster.doctor.findings import (
    WRONG,
    Finding,
    examine,
    named,
    table,
    together,
    told,
)
from neftune_dist.cluster.doctor.meeting import Meeting, Place, Roll

_MEET_SECONDS = 120.0  # ranks may start this far apart
_CHECKS_SECONDS = 240.0
_LONGEST_SECONDS = 900.0  # more than all that is waited for
_LEAVE_SECONDS = 10.0  # for last words: a launcher ends all ranks with the first one


def doctor(run_dir: Path, model: str | None = None) -> int:
    """Check the machines of a run, and that `run_dir` can be written (it is not made); rank 0
    prints the table.

    Args:
        model: a directory or a hub id, of which to check that it can be had.

    Returns:
        0 where nothing is wrong, else 2: on all ranks alike.
    """
    place = Place.here()
    # A machine that lost its power sends no word, and the store waits a quarter of an hour for one.
    end = threading.Timer(_LONGEST_SECONDS, _give_up, [place])
    end.daemon = True
    end.start()
    try:
        return _doctor(place, run_dir, model)
    finally:
        end.cancel()


def _doctor(place: Place, run_dir: Path, model: str | None) -> int:
    findings: list[Finding] = []
    try:
        meeting = Meeting(place, _MEET_SECONDS)
        roll = meeting.roll(_MEET_SECONDS, _notice)
    except Exception as error:  # no torch, no rank 0, no such address
        if place.local_rank == 0:
            findings, _ = _of_this_machine(place, run_dir, model, 1, 1)
        return _alone(place, findings, error)
    stuck = False
    try:
        stuck = _visit(meeting, roll, run_dir, model, findings)
        if place.rank == 0:
            code = _print(findings, list(roll.firsts), len(place.hosts))
            with suppress(Exception):  # all has been said
                meeting.say("verdict", code)
                meeting.collect("left", [rank for rank in roll.host_of if rank], _LEAVE_SECONDS)
        else:
            code = int(meeting.hear("verdict", 0, 2 * _CHECKS_SECONDS))
            meeting.say("left", True)
    except Exception as error:  # rank 0 has gone, or torchrun's agent, and the store with it
        code = _alone(place, findings, error)
    if stuck:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _visit(
    meeting: Meeting, roll: Roll, run_dir: Path, model: str | None, findings: list[Finding]
) -> bool:
    """Put into rank 0's `findings` what is seen; whether native code was left behind."""
    place, hosts = meeting.place, list(roll.firsts)
    is_first = place.rank in roll.firsts.values()
    if place.rank == 0:
        _notice(f"{len(roll.host_of)} of {place.size} ranks are here, on {named(hosts)}")
    if is_first:
        num_ranks = sum(host == place.host for host in roll.host_of.values())
        mine, versions = _of_this_machine(place, run_dir, model, num_ranks, len(hosts))
        findings += mine
        meeting.say("report", [[each.to_dict() for each in mine], versions])
    if place.rank == 0:
        reports = meeting.collect("report", roll.firsts.values(), 1.5 * _CHECKS_SECONDS)
        local = [Finding(**each) for of_host, _ in reports.values() for each in of_host]
        findings[:] = together(local, hosts)
        findings += _absent(place, roll, reports)
        findings += software.compare_versions(
            {roll.host_of[rank]: versions for rank, (_, versions) in reports.items()}
        )
        meeting.say("go", [roll.host_of[rank] for rank in reports])
    # Only now do the other ranks touch the GPUs, which were to be seen idle.
    answering = meeting.hear("go", 0, 2 * _CHECKS_SECONDS)
    present = Roll({r: h for r, h in roll.host_of.items() if h in answering}, roll.token)
    if is_first and len(answering) > 1 and place.host in answering:
        findings += _tried("shared run dir", lambda: nodes.check_shared(meeting, present, run_dir))
        findings += _tried("clock", lambda: nodes.check_clocks(meeting, present))
    if len(present.host_of) < place.size:
        return False
    if place.rank == 0:
        _notice("each host has been checked; now the collectives of all ranks")
    found, left_behind = collectives.check_collectives(meeting, present)
    findings += found
    return left_behind


def _of_this_machine(
    place: Place, run_dir: Path, model: str | None, num_ranks: int, num_hosts: int
) -> tuple[list[Finding], dict[str, str]]:
    """Findings, and the versions by which machines are compared."""
    versions: dict[str, str] = {}

    def check_versions() -> Iterable[Finding]:
        versions.update(software.versions())
        return software.check_versions(versions)

    checks: Mapping[str, Callable[[], Iterable[Finding]]] = {
        "versions": check_versions,
        "requirements": software.check_requirements,
        "imports": software.check_imports,
        "conflicts": conflicts.check_conflicts,
        "GPUs": lambda: gpus.check_gpus(num_ranks),
        "GPU links": gpus.check_links,
        "host memory": lambda: machine.check_memory(max(num_ranks, gpus.count())),
        "cores": lambda: machine.check_cores(num_ranks, gpus.count()),
        "limits": lambda: machine.check_limits(place.size, num_hosts),
        "run directory": lambda: machine.check_run_dir(run_dir),
        "hub": lambda: machine.check_hub(model),
    }
    return examine(checks, place.host, _CHECKS_SECONDS), versions


def _absent(place: Place, roll: Roll, reports: Mapping[int, object]) -> list[Finding]:
    """Ranks that did not come, and hosts that came but finished no check."""
    found = []
    missing = [str(rank) for rank in range(place.size) if rank not in roll.host_of]
    if missing:
        hosts = tuple(host for host in place.hosts if host not in roll.firsts)
        where = f" ({named(hosts)})" if hosts else ""
        seen = f"rank {named(missing)}{where} did not come within {_MEET_SECONDS:.0f} seconds"
        mend = (
            f"is the host up, does Python start there, does it reach {place.address}:{place.port}?"
        )
        found.append(Finding(WRONG, "ranks", seen, mend, hosts))
    silent = tuple(host for host, rank in roll.firsts.items() if rank not in reports)
    if silent:
        seen = f"{named(silent)} came, but did not finish the checks"
        found.append(Finding(WRONG, "ranks", seen, "see its own output", silent))
    return found


def _tried(check: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(run())
    except Exception as error:
        return [Finding(WRONG, check, told(error), "see the other findings")]


def _alone(place: Place, findings: list[Finding], error: Exception) -> int:
    """Say what this rank knows without the others: on standard error, but for rank 0."""
    mend = "check MASTER_ADDR, MASTER_PORT, and the network between hosts"
    if isinstance(error, ImportError):
        mend = "install torch"
    seen = told(error) if place.size == 1 else f"rank {place.rank}: {told(error)}"
    findings = [*findings, Finding(WRONG, "ranks", seen, mend, (place.host,))]
    if place.rank:
        time.sleep(_LEAVE_SECONDS)
    return _print(findings, [place.host], file=sys.stdout if place.rank == 0 else sys.stderr)


def _print(
    findings: Sequence[Finding], hosts: Sequence[str], num_all: int = 0, file: TextIO | None = None
) -> int:
    """Print the table; the exit code."""
    print("\n".join(table(findings, hosts, num_all)), file=file or sys.stdout, flush=True)
    return 2 if any(each.status == WRONG for each in findings) else 0


def _give_up(place: Place) -> None:
    seen = f"rank {place.rank} did not end within {_LONGEST_SECONDS:.0f} seconds"
    finding = Finding(WRONG, "ranks", seen, "see what the other hosts say", (place.host,))
    _print([finding], [place.host], file=sys.stdout if place.rank == 0 else sys.stderr)
    os._exit(2)


def _notice(line: str) -> None:
    """Progress, apart from the table."""
    print(f"neftune-dist: {line}", file=sys.stderr, flush=True)
