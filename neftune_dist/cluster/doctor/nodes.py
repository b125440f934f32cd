"""Checks that need several hosts: whether they share the run directory, and the time.

The first rank of every host calls each check, in the same order; rank 0 gets the findings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, named
from neftune_dist.cluster.doctor.machine import existing
from neftune_dist.cluster.doctor.ranks import Ranks
from neftune_dist.system import storage

_WRITE_SECONDS = 60.0
_SEEN_SECONDS = 15.0  # network file systems may keep what they know of a folder for some seconds
_MOST_SKEW_SECONDS = 1.0
_NUM_ROUNDS = 4


def check_shared(ranks: Ranks, run_dir: Path) -> Iterator[Finding]:
    """Whether each host sees what rank 0 writes, and rank 0 what each host writes.

    The files are removed.
    """
    mailbox, rank, folder = ranks.mailbox, ranks.place.rank, existing(run_dir)
    names = {r: f".doctor-{ranks.token}-{r}" for r in ranks.firsts.values()}
    with suppress(OSError):  # the check of the run directory says that it cannot be written
        storage.write(folder / names[rank], ranks.host, durable=True)
    try:
        mailbox.post("written", (folder / names[rank]).exists())
        written = mailbox.collect("written", names, _WRITE_SECONDS)
        there = [r for r, is_written in written.items() if is_written]
        sought = {r: ranks.host_of[r] for r in there if rank == 0 or r == 0}
        mailbox.post("seen", _seen({folder / names[r]: (r, host) for r, host in sought.items()}))
        seen = mailbox.collect("seen", there, 2 * _SEEN_SECONDS)
    finally:
        with suppress(OSError):
            (folder / names[rank]).unlink(missing_ok=True)
    if rank == 0:
        yield from _shared(run_dir, ranks, there, seen)


def _seen(sought: Mapping[Path, tuple[int, str]]) -> list[int]:
    """The ranks whose files can be read here, with the right content, before long."""
    deadline, found = time.monotonic() + _SEEN_SECONDS, list[int]()
    while len(found) < len(sought):
        for path, (rank, content) in sought.items():
            with suppress(OSError):
                if rank not in found and path.read_text() == content:
                    found.append(rank)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return found


def _shared(
    run_dir: Path, ranks: Ranks, there: list[int], seen: Mapping[int, list[int]]
) -> Iterator[Finding]:
    first, others = ranks.host_of[0], [rank for rank in there if rank != 0]
    if 0 not in there or not others:
        return  # nothing was written: the check of the run directory says so
    blind = [ranks.host_of[rank] for rank in others if 0 not in seen.get(rank, [])]
    unseen = [ranks.host_of[rank] for rank in others if rank not in seen.get(0, [])]
    problems = []
    if blind:
        verb = "does" if len(blind) == 1 else "do"
        problems.append(f"{named(blind)} {verb} not see what {first} writes")
    if unseen:
        problems.append(f"{first} does not see what {named(unseen)} writes")
    if problems:
        text = f"run_dir={run_dir} is not shared: {'; '.join(problems)}"
        fix = "choose a directory on the cluster's shared file system"
        hosts = tuple(dict.fromkeys([*blind, *unseen]))
        yield Finding(WRONG, "shared run dir", text, fix, hosts)
    else:
        yield Finding(OK, "shared run dir", f"{existing(run_dir)} is the same on all hosts")


def check_clocks(ranks: Ranks) -> Iterator[Finding]:
    """How far each host's clock is from that of rank 0's host.

    In each of a few rounds the hosts read their clocks when they hear from rank 0, later by the
    pause between two questions at most; the round with the least difference counts.
    """
    mailbox, is_first = ranks.mailbox, ranks.place.rank == 0
    firsts = ranks.firsts.values()
    skews: dict[int, float] = {}
    for i in range(_NUM_ROUNDS):
        mailbox.post(f"ready {i}", True)
        if is_first:
            mailbox.collect(f"ready {i}", firsts, _WRITE_SECONDS)
            mailbox.post(f"now {i}", True)
        else:
            mailbox.read(f"now {i}", 0, 2 * _WRITE_SECONDS)
        mailbox.post(f"clock {i}", time.time())
        if is_first:
            clocks = mailbox.collect(f"clock {i}", firsts, _WRITE_SECONDS)
            for rank, clock in clocks.items():
                skews[rank] = min(skews.get(rank, math.inf), clock - clocks[0], key=abs)
    fix = "set the clocks by NTP (chronyd): logs, checkpoints and time-outs go by them"
    for rank, skew in skews.items():
        if abs(skew) > _MOST_SKEW_SECONDS:
            way = "ahead of" if skew > 0 else "behind"
            seen = f"{abs(skew):.1f} seconds {way} {ranks.host_of[0]}"
            yield Finding(WARNING, "clock", seen, fix, (ranks.host_of[rank],))
    most = max(map(abs, skews.values()), default=math.inf)
    if most <= _MOST_SKEW_SECONDS:
        yield Finding(OK, "clock", f"at most {most * 1000:.0f} ms apart")
