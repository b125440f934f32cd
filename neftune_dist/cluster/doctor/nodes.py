"""Checks that need several hosts: whether they share the run directory, and the time.

All ranks call each check, in the same order, and get the same findings.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, named
from neftune_dist.cluster.doctor.ranks import Ranks
from neftune_dist.system.storage import existing, sync

_WRITE_SECONDS = 60.0
_SEEN_SECONDS = 15.0  # network file systems may cache a folder's names for some seconds
_MOST_SKEW_SECONDS = 1.0
_NUM_ROUNDS = 4


def check_shared(ranks: Ranks, run_dir: Path) -> Iterator[Finding]:
    """Check that each host sees the file of rank 0, and rank 0 the file of each host.

    The files are removed.
    """
    folder, name = existing(run_dir), ""
    with ExitStack() as files:
        if ranks.is_first:
            with suppress(OSError):  # the check of the run directory says that it cannot be written
                file = NamedTemporaryFile(dir=folder, prefix=".doctor-")  # noqa: SIM115
                name = Path(files.enter_context(file).name).name
                sync(folder)
        names = ranks.gather("written", name, _WRITE_SECONDS)
        written = {rank: name for rank, name in names.items() if name}
        mine = _seen(folder, written) if name else []
        seen = ranks.gather("seen", mine, 2 * _SEEN_SECONDS)
    if 0 in written and len(written) > 1:
        yield _shared(run_dir, ranks.host_of, [*written], seen)


def _seen(folder: Path, written: Mapping[int, str]) -> list[int]:
    """The ranks whose files appear in the folder before long."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while True:
        # Listing a folder makes a network file system look again.
        names = {path.name for path in folder.glob("*")}
        seen = [rank for rank, name in written.items() if name in names]
        if len(seen) == len(written) or time.monotonic() > deadline:
            return seen
        time.sleep(0.05)


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
    skews: dict[int, float] = {}
    for i in range(_NUM_ROUNDS):
        ranks.gather(f"ready {i}", None, _WRITE_SECONDS)
        clocks = ranks.gather(f"clock {i}", time.time(), _WRITE_SECONDS)
        for rank in ranks.firsts.values():
            skews[rank] = min(skews.get(rank, math.inf), clocks[rank] - clocks[0], key=abs)
    fix = "set the clocks by NTP (chronyd): logs, checkpoints and time-outs go by them"
    wrong = {rank: skew for rank, skew in skews.items() if abs(skew) > _MOST_SKEW_SECONDS}
    for rank, skew in wrong.items():
        seen = f"{abs(skew):.1f} seconds {'ahead of' if skew > 0 else 'behind'} {ranks.host_of[0]}"
        yield Finding(WARNING, "clock", seen, fix, (ranks.host_of[rank],))
    if not wrong:
        yield Finding(OK, "clock", f"at most {max(map(abs, skews.values())) * 1000:.0f} ms apart")
