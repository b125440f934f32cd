"""Findings of checks, how checks run so that none can hang or fail, and the table of findings."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from neftune_dist.config import UserError
from neftune_dist.system.text import first_line

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


@dataclass(frozen=True)
class Site:
    """The run that a host is checked for.

    Attributes:
        run_dir: where it will write; need not exist.
        model: a directory or a hub id, if any.
        num_ranks: ranks on this host.
        versions: filled by the check of versions; all hosts' are compared.
    """

    run_dir: Path
    model: str | None = None
    num_ranks: int = 1
    versions: dict[str, str] = field(default_factory=dict)


Look = Callable[[Site], Iterable[tuple[str, str]]]


@dataclass(frozen=True)
class Check:
    """A check of one host.

    Attributes:
        name: a word or two.
        fix: advice wherever the status is not ok.
        look: yields a status and an observation for each thing it finds.
    """

    name: str
    fix: str
    look: Look


CHECKS: list[Check] = []  # of one host, in the order of the table


def check(name: str, fix: str = "") -> Callable[[Look], Look]:
    """Make a function the check of that name, behind those there are."""

    def register(look: Look) -> Look:
        CHECKS.append(Check(name, fix, look))
        return look

    return register


def within(seconds: float, work: Callable[[], T]) -> T:
    """Return or raise what `work` does.

    It runs in a thread, because name look-ups, network file systems and collectives wait in native
    code that heeds no time limit. A thread that is late is left behind.

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
    try:
        return done.result(seconds)
    except TimeoutError:
        if done.done():  # the work's own
            raise
        raise TimeoutError(f"no answer within {seconds:.0f} seconds") from None


def examine(checks: Iterable[Check], site: Site, host: str, seconds: float) -> list[Finding]:
    """Run the checks one after the other; an error of a check is a finding, too.

    Args:
        checks: those to run.
        site: the run that they check `host` for.
        host: to which the findings apply.
        seconds: for all of them.
    """
    deadline, found = time.monotonic() + seconds, list[Finding]()
    for item in checks:
        # No check may take the time of all others.
        limit = max(_SHORTEST_SECONDS, min(deadline - time.monotonic(), seconds / 2))
        fix = item.fix
        try:
            rows = within(limit, lambda look=item.look: list(look(site)))  # type: ignore[misc]
        except ImportError:  # the check of imports names the package
            continue
        except TimeoutError as error:
            rows = [(WRONG, str(error))]
            fix = "see what this machine waits for: its disks, network file systems or driver"
        except Exception as error:  # of a broken environment, which is the finding
            rows = [(WRONG, error_text(error))]
        found += [Finding(status, item.name, seen, fix, (host,)) for status, seen in rows]
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
    for finding in findings:
        shape = _QUANTITY.sub("#", finding.seen) if finding.status == OK else finding.seen
        groups.setdefault((finding.status, finding.check, shape, finding.fix), []).append(finding)
    rows = []
    for group in groups.values():
        on = {host for finding in group for host in finding.hosts}
        shared = tuple(host for host in hosts if host in on)
        rows.append(replace(group[0], seen=_ranges(group), hosts=shared))
    place = {host: i for i, host in enumerate(hosts)}
    everywhere = len(hosts)
    return sorted(rows, key=lambda row: -1 if len(row.hosts) == everywhere else place[row.hosts[0]])


def _ranges(group: Sequence[Finding]) -> str:
    columns = zip(*(_QUANTITY.findall(finding.seen) for finding in group), strict=True)
    limits = ((min(column, key=float), max(column, key=float)) for column in columns)
    ranges = iter(least if least == most else f"{least} to {most}" for least, most in limits)
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
        findings: its rows.
        hosts: that came.
        num_all: the number of those expected, where these are more.
    """
    num_all = max(num_all, len(hosts))
    rows = [("status", "check", "host", "seen, and -> how to fix it", "")]
    for f in findings:
        fix = f.fix if f.status != OK else ""
        rows.append((f.status, f.check, named(f.hosts or hosts, num_all), f.seen, fix))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for *cells, seen, fix in rows:
        yield "  ".join([*map(str.ljust, cells, widths), seen])
        if fix:
            yield f"{' ' * (sum(widths) + 6)}-> {fix}"
    num_wrong, num_warnings = (sum(f.status == s for f in findings) for s in (WRONG, WARNING))
    if num_wrong or num_warnings:
        yield f"{num_wrong} wrong, {num_warnings} warning{'' if num_warnings == 1 else 's'}"
    else:
        yield "all good"
