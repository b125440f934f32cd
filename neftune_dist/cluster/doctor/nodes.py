"""What only hosts together can show: that they share the run directory, and the time.

Each check is called by the first rank of every host, in the same order; rank 0 gets the findings.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, named
from neftune_dist.cluster.doctor.machine import existing
from neftune_dist.cluster.doctor.meeting import Meeting, Roll

_WRITE_SECONDS = 60.0
_SEEN_SECONDS = 15.0  # network file systems may keep what they know of a folder for some seconds
_PING_SECONDS = 20.0
_MOST_SKEW_SECONDS = 1.0
_NUM_PINGS = 4


def check_shared(meeting: Meeting, roll: Roll, run_dir: Path) -> Iterator[Finding]:
    """Whether each host's first rank sees what rank 0 writes, and rank 0 what each of them writes.

    The files are removed. To be called by the first rank of each host.
    """
    firsts, rank = roll.firsts, meeting.place.rank
    folder = existing(run_dir)

    def path(of: int) -> Path:
        return folder / f".doctor-{roll.token}-{of}"

    def content(of: int) -> str:
        return f"{roll.token} {roll.host_of[of]}"

    try:
        problem = ""
        try:
            with path(rank).open("w") as file:
                file.write(content(rank))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            problem = error.strerror or str(error)
        meeting.say("written", problem)
        if rank == 0:
            problems = meeting.collect("written", firsts.values(), _WRITE_SECONDS)
            meeting.say("look", [each for each, problem in problems.items() if not problem])
        there = meeting.hear("look", 0, 2 * _WRITE_SECONDS)
        sought = [each for each in (there if rank == 0 else [0]) if each in there]
        meeting.say("seen", _seen({each: (path(each), content(each)) for each in sought}))
        if rank == 0:
            seen = meeting.collect("seen", there, 2 * _SEEN_SECONDS)
            meeting.say("looked", True)
            yield from _shared(run_dir, roll, there, seen)
        else:
            meeting.hear("looked", 0, 4 * _SEEN_SECONDS)
    finally:
        with suppress(OSError):
            path(rank).unlink(missing_ok=True)


def _seen(sought: dict[int, tuple[Path, str]]) -> list[int]:
    """Whose file can be read here, with the right content, before long."""
    deadline, found = time.monotonic() + _SEEN_SECONDS, []
    while sought:
        for rank, (path, content) in list(sought.items()):
            with suppress(OSError):
                if path.read_text() == content:
                    found.append(rank)
                    del sought[rank]
        if not sought or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return found


def _shared(
    run_dir: Path, roll: Roll, there: list[int], seen: dict[int, list[int]]
) -> Iterator[Finding]:
    first, others = roll.host_of[0], [each for each in there if each != 0]
    if 0 not in there or not others:
        return  # nothing was written: the check of the run directory says so
    blind = [roll.host_of[each] for each in others if 0 not in seen.get(each, [])]
    unseen = [roll.host_of[each] for each in others if each not in seen.get(0, [])]
    problems = []
    if blind:
        verb = "does" if len(blind) == 1 else "do"
        problems.append(f"{named(blind)} {verb} not see what {first} writes")
    if unseen:
        problems.append(f"{first} does not see what {named(unseen)} writes")
    if problems:
        hosts = tuple(dict.fromkeys([*blind, *unseen]))
        seen_text = f"run_dir={run_dir} is not shared: {'; '.join(problems)}"
        mend = "choose a directory on the cluster's shared file system"
        yield Finding(WRONG, "shared run dir", seen_text, mend, hosts)
    else:
        yield Finding(OK, "shared run dir", f"{existing(run_dir)} is the same on all hosts")


def check_clocks(meeting: Meeting, roll: Roll) -> Iterator[Finding]:
    """How far each host's clock is from rank 0's, by the quickest of a few questions.

    An answer lies between asking and hearing it: half the round trip is the error. To be called by
    the first rank of each host.
    """
    others = {host: rank for host, rank in roll.firsts.items() if rank != 0}
    if meeting.place.rank != 0:
        for i in range(_NUM_PINGS):
            meeting.hear(f"ping {i} {meeting.place.rank}", 0, _PING_SECONDS * len(others))
            meeting.say(f"pong {i}", time.time())
        return
    skews: dict[str, tuple[float, float]] = {}  # host -> error, skew: least is quickest
    for host, rank in others.items():
        for i in range(_NUM_PINGS):
            asked, began = time.time(), time.perf_counter()
            meeting.say(f"ping {i} {rank}", True)
            try:
                answer = meeting.hear(f"pong {i}", rank, _PING_SECONDS)
            except TimeoutError:
                break
            half = (time.perf_counter() - began) / 2
            measured = (half, answer - asked - half)
            skews[host] = min(skews.get(host, measured), measured)
    mend = (
        "set the clocks by NTP (chronyd): times of logs and checkpoints, and time-outs go by them"
    )
    for host, (error, skew) in skews.items():
        if abs(skew) - error > _MOST_SKEW_SECONDS:
            way = "ahead of" if skew > 0 else "behind"
            seen = f"{abs(skew):.1f} seconds {way} {roll.host_of[0]}"
            yield Finding(WARNING, "clock", seen, mend, (host,))
    most = max((abs(skew) + error for error, skew in skews.values()), default=0.0)
    if skews and most <= _MOST_SKEW_SECONDS:
        yield Finding(OK, "clock", f"at most {most * 1000:.0f} ms apart")
