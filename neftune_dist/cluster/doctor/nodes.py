"""Checks that need several hosts: whether they share the run directory, and the time.

The first rank of every host calls each check, in the same order; rank 0 gets the findings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, named
from neftune_dist.cluster.doctor.ranks import Ranks
from neftune_dist.system.storage import existing, write

_WRITE_SECONDS = 60.0
_SEEN_SECONDS = 15.0  # network file systems may cache a folder's names for some seconds
_MOST_SKEW_SECONDS = 1.0
_NUM_ROUNDS = 4


def check_shared(ranks: Ranks, run_dir: Path) -> Iterator[Finding]:
    """Check that each host sees the file of rank 0, and rank 0 the file of each host.

    The files are removed.
    """
    mailbox, rank, folder = ranks.mailbox, ranks.place.rank, existing(run_dir)
    names = {r: f".doctor-{ranks.token}-{r}" for r in ranks.firsts.values()}
    with suppress(OSError):  # the check of the run directory says that it cannot be written
        write(folder / names[rank], ranks.host, durable=True)
    try:
        mailbox.post("written", (folder / names[rank]).exists())
        answers = mailbox.collect("written", names, _WRITE_SECONDS)
        written = [r for r, is_written in answers.items() if is_written]
        sought = [r for r in written if rank == 0 or r == 0]
        mailbox.post("seen", _seen(folder, {names[r]: r for r in sought}))
        seen = mailbox.collect("seen", written, 2 * _SEEN_SECONDS)
    finally:
        with suppress(OSError):
            (folder / names[rank]).unlink(missing_ok=True)
    if rank == 0 and 0 in written and len(written) > 1:
        yield _shared(run_dir, ranks.host_of, written, seen)


def _seen(folder: Path, sought: Mapping[str, int]) -> list[int]:
    """The ranks of the files that appear in the folder before long."""
    deadline = time.monotonic() + _SEEN_SECONDS
    # Listing a folder makes a network file system look again.
    while missing := sought.keys() - {path.name for path in folder.glob("*")}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return [rank for name, rank in sought.items() if name not in missing]


def _shared(
    run_dir: Path,
    host_of: Mapping[int, str],
    written: Sequence[int],
    seen: Mapping[int, Sequence[int]],
) -> Finding:
    first, others = host_of[0], [rank for rank in written if rank != 0]
    blind = [host_of[rank] for rank in others if 0 not in seen.get(rank, [])]
    unseen = [host_of[rank] for rank in others if rank not in seen.get(0, [])]
    problems = [f"{named(blind)} cannot see files of {first}"] if blind else []
    problems += [f"{first} cannot see files of {named(unseen)}"] if unseen else []
    if not problems:
        return Finding(OK, "shared run dir", f"{existing(run_dir)} is the same on all hosts")
    fix = "choose a directory on the cluster's shared file system"
    hosts = tuple(dict.fromkeys([*blind, *unseen]))
    text = f"run_dir={run_dir} is not shared: {'; '.join(problems)}"
    return Finding(WRONG, "shared run dir", text, fix, hosts)


def check_clocks(ranks: Ranks) -> Iterator[Finding]:
    """Compare each host's clock with that of rank 0's host.

    In each of a few rounds the hosts read their clocks when they hear from rank 0, later by the
    pause between two questions at most; the round with the least difference counts.
    """
    mailbox, firsts = ranks.mailbox, ranks.firsts.values()
    skews: dict[int, float] = {}
    for i in range(_NUM_ROUNDS):
        mailbox.post(f"ready {i}", True)
        if ranks.place.rank == 0:
            mailbox.collect(f"ready {i}", firsts, _WRITE_SECONDS)
            mailbox.post(f"now {i}", True)
        mailbox.read(f"now {i}", 0, 2 * _WRITE_SECONDS)
        mailbox.post(f"clock {i}", time.time())
        if ranks.place.rank == 0:
            clocks = mailbox.collect(f"clock {i}", firsts, _WRITE_SECONDS)
            for rank, clock in clocks.items():
                skews[rank] = min(skews.get(rank, math.inf), clock - clocks[0], key=abs)
    fix = "set the clocks by NTP (chronyd): logs, checkpoints and time-outs go by them"
    wrong = {rank: skew for rank, skew in skews.items() if abs(skew) > _MOST_SKEW_SECONDS}
    for rank, skew in wrong.items():
        seen = f"{abs(skew):.1f} seconds {'ahead of' if skew > 0 else 'behind'} {ranks.host_of[0]}"
        yield Finding(WARNING, "clock", seen, fix, (ranks.host_of[rank],))
    if skews and not wrong:
        yield Finding(OK, "clock", f"at most {max(map(abs, skews.values())) * 1000:.0f} ms apart")
