"""`neftune-dist doctor`: each machine is checked by its first rank, then the ranks together.

    all ranks meet                      who does not come is named
    the first of each host              CHECKS: software, GPUs, memory, disk, model
    the first of each host, together    shared run directory, clocks
    all ranks                           collectives
    rank 0                              the table and the exit code, with which all ranks leave

Nothing is raised and nothing waits without end: problems are rows of the table. Torch is imported
by the checks that need it, so that a broken one is such a row, too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TextIO

from neftune_dist.cluster.doctor import collectives, machine, nodes, software  # noqa: F401 (checks)
from neftune_dist.cluster.doctor.findings import (
    CHECKS,
    WRONG,
    Finding,
    Site,
    error_text,
    examine,
    named,
    table,
    together,
)
from neftune_dist.cluster.doctor.ranks import Ranks, host_name, meet, slurm_step
from neftune_dist.distributed import environment

_MEET_SECONDS = 120.0  # ranks may start this far apart
_CHECKS_SECONDS = 240.0
_LONGEST_SECONDS = 900.0  # more than all waits together
_LEAVE_SECONDS = 10.0  # for last words: a launcher ends all ranks with the first one


def doctor(run_dir: Path, model: str | None = None) -> int:
    """Check the machines of a run; rank 0 prints the table.

    Args:
        run_dir: to be checked whether it can be written; it is not made.
        model: a directory or a hub id, to be checked whether it can be loaded.

    Returns:
        0 where nothing is wrong, else 2: on all ranks alike.
    """
    # A machine that lost its power sends no word, and the store waits a quarter of an hour for one.
    end = threading.Timer(_LONGEST_SECONDS, _give_up)
    end.daemon = True
    end.start()
    findings: list[Finding] = []
    left_behind = False
    try:
        variables, hosts = slurm_step()
        os.environ.update(variables)
        ranks = meet(environment.find_place(), _MEET_SECONDS)
    except Exception as error:  # no torch, no rank 0, no such address
        if environment.number("LOCAL_RANK", 0) == 0:
            findings = examine(CHECKS, Site(run_dir, model), host_name(), _CHECKS_SECONDS)
        return _alone(findings, error)
    try:
        left_behind = _check(ranks, hosts, Site(run_dir, model), findings)
        code = _conclude(ranks, max(len(hosts), len(ranks.firsts)), findings)
    except Exception as error:  # rank 0 has gone, or torchrun's agent, and the store with it
        code = _alone(findings, error)
    end.cancel()
    if left_behind:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _check(ranks: Ranks, hosts: Sequence[str], site: Site, findings: list[Finding]) -> bool:
    """Add rank 0's findings to `findings`; whether native code was left behind."""
    mailbox, rank, firsts = ranks.mailbox, ranks.place.rank, ranks.firsts
    _notice(rank, f"{len(ranks.host_of)} of {mailbox.size} ranks are here, on {named([*firsts])}")
    if rank in firsts.values():
        num_ranks = list(ranks.host_of.values()).count(ranks.host)
        site = replace(site, num_ranks=num_ranks, num_all_ranks=mailbox.size, num_hosts=len(firsts))
        findings += examine(CHECKS, site, ranks.host, _CHECKS_SECONDS)
        mailbox.post("report", [[asdict(finding) for finding in findings], site.versions])
    if rank == 0:
        reports = mailbox.collect("report", firsts.values(), 1.5 * _CHECKS_SECONDS)
        local = [Finding(**fields) for rows, _ in reports.values() for fields in rows]
        findings[:] = together(local, [*firsts])
        findings += _absent(ranks, hosts, reports)
        findings += software.compare_versions(
            {ranks.host_of[first]: versions for first, (_, versions) in reports.items()}
        )
        mailbox.post("answering", [ranks.host_of[first] for first in reports])
    # Only now do the other ranks touch the GPUs, which had to be idle for the checks.
    present = ranks.of_hosts(mailbox.read("answering", 0, 2 * _CHECKS_SECONDS))
    if rank in present.firsts.values() and len(present.firsts) > 1:
        findings += _tried("shared run dir", lambda: nodes.check_shared(present, site.run_dir))
        findings += _tried("clock", lambda: nodes.check_clocks(present))
    if len(present.host_of) < mailbox.size:
        return False
    _notice(rank, "each host has been checked; now the collectives of all ranks")
    found, left_behind = collectives.check_collectives(present)
    findings += found
    return left_behind


def _absent(ranks: Ranks, expected: Sequence[str], reports: Mapping[int, object]) -> list[Finding]:
    """Ranks that did not come, and hosts that came but finished no check."""
    found, place, firsts = list[Finding](), ranks.place, ranks.firsts
    missing = [str(rank) for rank in range(place.size) if rank not in ranks.host_of]
    if missing:
        hosts = tuple(host for host in expected if host not in firsts)
        where = f" ({named(hosts)})" if hosts else ""
        seen = f"rank {named(missing)}{where} did not come within {_MEET_SECONDS:.0f} seconds"
        reach = f"does it reach {place.address}:{place.port}?"
        fix = f"is the host up, does Python start there, {reach}"
        found.append(Finding(WRONG, "ranks", seen, fix, hosts))
    silent = tuple(host for host, rank in firsts.items() if rank not in reports)
    if silent:
        seen = f"{named(silent)} came, but did not finish the checks"
        found.append(Finding(WRONG, "ranks", seen, "see its own output", silent))
    return found


def _tried(name: str, run: Callable[[], Iterable[Finding]]) -> list[Finding]:
    try:
        return list(run())
    except Exception as error:
        return [Finding(WRONG, name, error_text(error), "see the other findings")]


def _conclude(ranks: Ranks, num_hosts: int, findings: Sequence[Finding]) -> int:
    """Print the table on rank 0; the exit code, on all ranks. Rank 0 leaves last."""
    mailbox = ranks.mailbox
    if ranks.place.rank:
        code = int(mailbox.read("code", 0, 2 * _CHECKS_SECONDS))
        mailbox.post("left", True)
        return code
    code = _print(findings, [*ranks.firsts], num_hosts)
    with suppress(Exception):  # all has been said
        mailbox.post("code", code)
        mailbox.collect("left", [rank for rank in ranks.host_of if rank], _LEAVE_SECONDS)
    return code


def _alone(findings: Sequence[Finding], error: Exception | str) -> int:
    """Print the findings of this rank without the others: on standard error, but for rank 0."""
    rank, host = environment.number("RANK", 0), host_name()
    seen = error if isinstance(error, str) else error_text(error)
    if environment.number("WORLD_SIZE", 1) > 1:
        seen = f"rank {rank}: {seen}"
    fix = "check MASTER_ADDR, MASTER_PORT, and the network between hosts"
    if isinstance(error, ImportError):
        fix = "install torch"
    if rank and not isinstance(error, str):
        time.sleep(_LEAVE_SECONDS)
    rows = [*findings, Finding(WRONG, "ranks", seen, fix, (host,))]
    return _print(rows, [host], file=sys.stderr if rank else sys.stdout)


def _print(
    findings: Sequence[Finding], hosts: Sequence[str], num_all: int = 0, file: TextIO | None = None
) -> int:
    """Print the table; the exit code."""
    print("\n".join(table(findings, hosts, num_all)), file=file or sys.stdout, flush=True)
    return 2 if any(finding.status == WRONG for finding in findings) else 0


def _give_up() -> None:
    _alone([], f"did not end within {_LONGEST_SECONDS:.0f} seconds: see the other hosts' output")
    os._exit(2)


def _notice(rank: int, line: str) -> None:
    """Progress on rank 0, apart from the table."""
    if rank == 0:
        print(f"neftune-dist: {line}", file=sys.stderr, flush=True)
