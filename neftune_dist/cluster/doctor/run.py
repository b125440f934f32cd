"""`neftune-dist doctor`: each machine is checked by its first rank, then the ranks together.

    all ranks                 meet: who does not come is named
    the first of each host    CHECKS: software, GPUs, memory, disk, model
    all ranks                 shared run directory, clocks, collectives; all know all findings
    rank 0                    prints the table

Nothing is raised and nothing waits without end: problems are rows of the table. Torch is imported
by the checks that need it, so that a broken one is such a row, too.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from neftune_dist.cluster.doctor import joint, machine, software  # noqa: F401 (checks)
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
from neftune_dist.config import UserError
from neftune_dist.distributed import environment, outcome

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
    site, findings, ranks = Site(run_dir, model), list[Finding](), None
    try:
        variables, hosts = slurm_step()
        os.environ.update(variables)
        ranks = meet(environment.find_place(), _MEET_SECONDS)
        _check(ranks, hosts, site, findings)
        code = _conclude(ranks, len(hosts), findings)
    except Exception as error:  # no torch, no rank 0, no such address; or the store has gone
        if not ranks and environment.number("LOCAL_RANK", 0) == 0:
            findings = examine(CHECKS, site, host_name(), _CHECKS_SECONDS)
        code = _alone(findings, error)
    end.cancel()
    if code:  # native code that never returns may have been left behind
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _check(ranks: Ranks, expected: Sequence[str], site: Site, findings: list[Finding]) -> None:
    """Add the findings of all ranks to `findings`, the same on each of them."""
    num_ranks, hosts, report = ranks.place.size, [*ranks.firsts], None
    _notice(ranks, f"{len(ranks.present)} of {num_ranks} ranks are here, on {named(hosts)}")
    if ranks.is_first:
        host = ranks.host_of[ranks.place.rank]
        on_host = [*ranks.host_of.values()].count(host)
        site = replace(site, num_ranks=on_host)
        findings += examine(CHECKS, site, host, _CHECKS_SECONDS)
        report = [[asdict(finding) for finding in findings], site.versions]
    # Only after this do the other ranks touch the GPUs, which have to be idle for the checks.
    posted = ranks.gather("report", report, 1.5 * _CHECKS_SECONDS)
    reports = {ranks.host_of[rank]: report for rank, report in posted.items() if report}
    local = [Finding(**fields) for rows, _ in reports.values() for fields in rows]
    findings[:] = together(local, hosts)
    findings += _absent(ranks, expected, reports)
    findings += software.compare_versions({h: versions for h, (_, versions) in reports.items()})
    if len(ranks.firsts) > 1:
        findings += joint.check_shared(ranks, site.run_dir)
        findings += joint.check_clocks(ranks)
    if len(ranks.present) == num_ranks:
        _notice(ranks, "each host has been checked; now the collectives of all ranks")
        findings += joint.check_collectives(ranks)


def _absent(
    ranks: Ranks, expected: Sequence[str], reports: Mapping[str, object]
) -> Iterator[Finding]:
    """Ranks that did not come, and hosts that came but finished no check."""
    place, came = ranks.place, dict.fromkeys(ranks.host_of.values())
    missing = [str(rank) for rank in range(place.size) if rank not in ranks.host_of]
    if missing:
        hosts = tuple(host for host in expected if host not in came)
        where = f" ({named(hosts)})" if hosts else ""
        seen = f"rank {named(missing)}{where} did not come within {_MEET_SECONDS:.0f} seconds"
        reach = f"does it reach {place.address}:{place.port}?"
        yield Finding(
            WRONG, "ranks", seen, f"is the host up, does Python start there, {reach}", hosts
        )
    silent = tuple(host for host in came if host not in reports)
    if silent:
        seen = f"{named(silent)} came, but did not finish the checks"
        yield Finding(WRONG, "ranks", seen, "see its own output", silent)


def _conclude(ranks: Ranks, num_hosts: int, findings: Sequence[Finding]) -> int:
    """Print the table on rank 0, which leaves last; the exit code."""
    is_0 = ranks.place.rank == 0
    if is_0:
        came = [*dict.fromkeys(ranks.host_of.values())]
        print("\n".join(table(findings, came, num_hosts)), flush=True)
    with suppress(Exception):  # all has been said
        ranks.mailbox.post("left", True)
        if is_0:
            ranks.mailbox.collect("left", ranks.present, _LEAVE_SECONDS)
    wrong = any(finding.status == WRONG for finding in findings)
    return outcome.EXIT_MISTAKE if wrong else outcome.EXIT_DONE


def _alone(findings: Sequence[Finding], error: Exception) -> int:
    """Print the findings of this rank without the others: on standard error, but for rank 0."""
    rank, host = environment.number("RANK", 0), host_name()
    seen = error_text(error)
    if environment.number("WORLD_SIZE", 1) > 1:
        seen = f"rank {rank}: {seen}"
    fix = "check MASTER_ADDR, MASTER_PORT, and the network between hosts"
    if isinstance(error, ImportError):
        fix = "install torch"
    if rank:
        time.sleep(_LEAVE_SECONDS)
    rows = [*findings, Finding(WRONG, "ranks", seen, fix, (host,))]
    print("\n".join(table(rows, [host])), file=sys.stderr if rank else sys.stdout, flush=True)
    return outcome.EXIT_MISTAKE


def _give_up() -> None:
    late = f"did not end within {_LONGEST_SECONDS:.0f} seconds: see the other hosts' output"
    _alone([], UserError(late))
    os._exit(outcome.EXIT_MISTAKE)


def _notice(ranks: Ranks, line: str) -> None:
    """Progress on rank 0, apart from the table."""
    if ranks.place.rank == 0:
        print(f"neftune-dist: {line}", file=sys.stderr, flush=True)
