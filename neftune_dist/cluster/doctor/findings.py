"""Findings of checks, how checks run so that none can hang or fail, and the table of findings."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import TypeVar

from neftune_dist.config import UserError
from neftune_dist.system.text import first_line

OK, WARNING, WRONG = "ok", "warning", "wrong"
_MOST_HOSTS_NAMED = 4
_SHORTEST_SECONDS = 5.0  # that a check has, however late it is
_LOOK_SECONDS, _GRACE_SECONDS = 0.05, 3.0
# A measured quantity: a number that a unit follows. A version has no unit, a path no space.
_QUANTITY = re.compile(r"(?<![\w.:/-])\d+(?:\.\d+)?(?= [A-Za-z])")
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        status: ok | warning | wrong.
        check: its name, a word or two.
        seen: the observation.
        fix: advice, shown where the status is not ok.
        hosts: to which it applies; empty: to all of them together.
    """

    status: str
    check: str
    seen: str
    fix: str = ""
    hosts: tuple[str, ...] = ()


def within(seconds: float, work: Callable[[], T], give_up: Callable[[], bool] | None = None) -> T:
    """Return or raise what `work` does.

    It runs in a thread, because name look-ups, network file systems and collectives wait in native
    code that heeds no time limit. A thread that is late is left behind.

    Args:
        give_up: asked meanwhile; where it is true, `work` has a few seconds left.

    Raises:
        TimeoutError: `work` takes longer than `seconds`.
    """
    done = Future[T]()

    def run() -> None:
        try:
            done.set_result(work())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    began, end = time.monotonic(), time.monotonic() + seconds
    while not done.done() and time.monotonic() < end:
        wait([done], min(_LOOK_SECONDS, end - time.monotonic()) if give_up else seconds)
        if give_up and give_up():
            end = min(end, time.monotonic() + _GRACE_SECONDS)
            give_up = None
    if not done.done():
        raise TimeoutError(f"no answer within {time.monotonic() - began:.0f} seconds")
    return done.result()


def examine(
    checks: Mapping[str, Callable[[], Iterable[Finding]]], host: str, seconds: float
) -> list[Finding]:
    """Run the checks one after the other; an error of a check is a finding, too.

    Args:
        checks: by name.
        host: to which findings apply that name none.
        seconds: for all of them.
    """
    deadline, found = time.monotonic() + seconds, list[Finding]()
    for name, check in checks.items():
        # No check may take the time of all others.
        limit = max(_SHORTEST_SECONDS, min(deadline - time.monotonic(), seconds / 2))
        try:
            findings = within(limit, lambda check=check: list(check()))  # type: ignore[misc]
        except Exception as error:  # of a broken environment, which is the finding
            fix = "see that this works by itself"
            if isinstance(error, TimeoutError):
                fix = "see what this machine waits for: its disks, network file systems or driver"
            findings = [Finding(WRONG, name, error_text(error), fix)]
        found += [each if each.hosts else replace(each, hosts=(host,)) for each in findings]
    return found


def error_text(error: BaseException) -> str:
    """An error in one line, its type first where that says more."""
    line, kind = first_line(error), type(error).__name__
    return line if isinstance(error, UserError) or line == kind else f"{kind}: {line}"


def together(findings: Sequence[Finding], hosts: Sequence[str]) -> list[Finding]:
    """Join equal findings of several hosts into one row; rows of all hosts come first.

    Measured quantities may differ between hosts: the row gives the least and the most.
    """
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for each in findings:
        shape = _QUANTITY.sub("#", each.seen) if each.status == OK else each.seen
        groups.setdefault((each.status, each.check, shape, each.fix), []).append(each)
    rows = []
    for group in groups.values():
        named = {host for each in group for host in each.hosts}
        shared = tuple(host for host in hosts if host in named)
        rows.append(replace(group[0], seen=_ranges(group), hosts=shared))
    everywhere = [row for row in rows if len(row.hosts) == len(hosts)]
    return everywhere + sorted(
        (row for row in rows if row not in everywhere),
        key=lambda row: hosts.index(row.hosts[0]) if row.hosts else len(hosts),
    )


def _ranges(group: Sequence[Finding]) -> str:
    columns = list(zip(*(_QUANTITY.findall(each.seen) for each in group), strict=True))
    ranges = iter(
        least if least == most else f"{least} to {most}"
        for least, most in ((min(c, key=float), max(c, key=float)) for c in columns)
    )
    return _QUANTITY.sub(lambda _: next(ranges), group[0].seen)


def named(hosts: Sequence[str], num_all: int = 0) -> str:
    """Name hosts (or ranks) briefly: all of several, or the first few of them."""
    if len(hosts) > 1 and len(hosts) == num_all:
        return f"all {num_all} hosts"
    rest = len(hosts) - _MOST_HOSTS_NAMED
    if rest > 1:
        return f"{', '.join(hosts[:_MOST_HOSTS_NAMED])} and {rest} more"
    return ", ".join(hosts)


def table(findings: Sequence[Finding], hosts: Sequence[str], num_all: int = 0) -> Iterator[str]:
    """Aligned lines: status, check, host, the observation, and below it the advice.

    Args:
        hosts: that came. num_all: that were to come, where these are more.
    """
    num_all = max(num_all, len(hosts))
    rows = [
        (each.status, each.check, named(each.hosts or hosts, num_all), each.seen)
        for each in findings
    ]
    titles = ("status", "check", "host", "seen, and -> how to fix it")
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(3)]
    for row, finding in [(titles, None), *zip(rows, findings, strict=True)]:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        yield "  ".join([*cells, row[3]])
        if finding and finding.status != OK and finding.fix:
            yield f"{' ' * (sum(widths) + 6)}-> {finding.fix}"
    num_wrong, num_warnings = (sum(f.status == s for f in findings) for s in (WRONG, WARNING))
    if num_wrong or num_warnings:
        yield f"{num_wrong} wrong, {num_warnings} warning{'' if num_warnings == 1 else 's'}"
    else:
        yield "all good"
