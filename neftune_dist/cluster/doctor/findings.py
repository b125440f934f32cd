"""What a check found, how checks are run so that none can hang or fail, and the table of it all."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

OK, WARNING, WRONG = "ok", "warning", "wrong"
_MOST_HOSTS_NAMED = 4
_SHORTEST_SECONDS = 5.0  # that a check has, however late it is
# A measured quantity: a number that a unit follows. A version has no unit, a path no space.
_QUANTITY = re.compile(r"(?<![\w.:/-])\d+(?:\.\d+)?(?= [A-Za-z])")
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        status: ok | warning | wrong.
        check: which one, in a word or two.
        seen: what was found. mend: what to do about it, where it is not ok.
        hosts: whom it is about; empty: the hosts taken together.
    """

    status: str
    check: str
    seen: str
    mend: str = ""
    hosts: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, to be sent to another rank."""
        return asdict(self)


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, or a `TimeoutError`.

    It runs in a thread, because name look-ups, network file systems and collectives wait in native
    code that heeds no time limit. A thread that is late is left behind.
    """
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    return done[0]


def examine(
    checks: Mapping[str, Callable[[], Iterable[Finding]]], host: str, seconds: float
) -> list[Finding]:
    """Run the checks one after the other; what one raises, whatever it is, is its finding.

    Args:
        host: whom findings are about that name none.
        seconds: for all together.
    """
    deadline, found = time.monotonic() + seconds, []
    for name, check in checks.items():
        left = deadline - time.monotonic()
        try:
            # No check may take the time of all others.
            limit = max(_SHORTEST_SECONDS, min(left, seconds / 2))
            findings = within(limit, lambda check=check: list(check()))  # type: ignore[misc]
        except TimeoutError as error:
            mend = "see what this machine waits for: its disks, network file systems or driver"
            findings = [Finding(WRONG, name, str(error), mend)]
        except Exception as error:  # of a broken environment, which is what was found
            findings = [Finding(WRONG, name, told(error), "see that this works by itself")]
        found += [each if each.hosts else replace(each, hosts=(host,)) for each in findings]
    return found


def told(error: BaseException) -> str:
    """An error in one line, without the native stack that torch appends."""
    text = str(error).strip().split("\nException raised from")[0].splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")


def together(findings: Sequence[Finding], hosts: Sequence[str]) -> list[Finding]:
    """The same finding of several hosts as one row; what all hosts share comes first.

    Measured quantities may differ between them: the row gives the least and the most.
    """
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for each in findings:
        shape = _QUANTITY.sub("#", each.seen) if each.status == OK else each.seen
        groups.setdefault((each.status, each.check, shape, each.mend), []).append(each)
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
    """Hosts in a few words: all of several, or the first few of them."""
    if len(hosts) > 1 and len(hosts) == num_all:
        return f"all {num_all} hosts"
    rest = len(hosts) - _MOST_HOSTS_NAMED
    if rest > 1:
        return f"{', '.join(hosts[:_MOST_HOSTS_NAMED])} and {rest} more"
    return ", ".join(hosts)


def table(findings: Sequence[Finding], hosts: Sequence[str], num_all: int = 0) -> Iterator[str]:
    """Aligned lines: status, check, host, what was seen, and below it how to mend it.

    Args:
        hosts: that came. num_all: that were to come, where these are more.
    """
    num_all = max(num_all, len(hosts))
    rows = [
        (each.status, each.check, named(each.hosts or hosts, num_all), each.seen)
        for each in findings
    ]
    titles = ("status", "check", "host", "seen, and -> how to mend it")
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(3)]
    for row, finding in [(titles, None), *zip(rows, findings, strict=True)]:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        yield "  ".join([*cells, row[3]])
        if finding and finding.status != OK and finding.mend:
            yield f"{' ' * (sum(widths) + 6)}-> {finding.mend}"
    num_wrong, num_warnings = (sum(f.status == s for f in findings) for s in (WRONG, WARNING))
    if num_wrong or num_warnings:
        yield f"{num_wrong} wrong, {num_warnings} warning{'' if num_warnings == 1 else 's'}"
    else:
        yield "all good"
