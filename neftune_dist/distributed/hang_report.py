"""The report of a hang: where each rank stands, and which of them holds up the others.

The same cause gives the same text, without times or numbers of collectives, so that the launcher
recognises a failure that repeats.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from neftune_dist.compat.torch import flight_record, process_groups

# Frames of these show how a rank waits, not for what it waits.
_WAITING_MODULES = {*sys.stdlib_module_names, "torch"}


@dataclass(frozen=True)
class Collective:
    """A collective that was begun and has not ended.

    Attributes:
        name: all_gather and so on.
        number: its place among those of its group, from 1.
        group: the group's name.
        ranks: all that must come to it.
    """

    name: str
    number: int
    group: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """The state of a rank.

    Attributes:
        phase: the current one, in the rank's own words.
        seconds: since the phase began.
        place: file, line and function of its main thread.
        waits_in: its oldest collective that has not ended, if any.
        reached: the number of the last collective that it came to, by group.
    """

    phase: str
    seconds: float
    place: str
    waits_in: Collective | None
    reached: Mapping[str, int]

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> Report:
        """The report of another rank, as `asdict` and JSON made it."""
        if waits_in := fields["waits_in"]:
            waits_in = Collective(**{**waits_in, "ranks": tuple(waits_in["ranks"])})
        return Report(**{**fields, "waits_in": waits_in})

    def __str__(self) -> str:
        text = f"{self.phase} for {self.seconds:.0f} s, at {self.place}"
        if self.waits_in:
            waits = self.waits_in
            return f"{text}; waits in {waits.name}, number {waits.number} of group {waits.group}"
        reached = ", ".join(f"number {n} of group {group}" for group, n in self.reached.items())
        return f"{text}; waits in no collective, came to {reached or 'none'}"


def observe(phase: str, seconds: float, main_thread: int) -> Report:
    """Make this process's report.

    Args:
        phase: the current one.
        seconds: since it began.
        main_thread: identifier of the main thread.
    """
    ranks_of = {
        str(group.group_name): tuple(dist.get_process_group_ranks(group))
        for group in process_groups()
    }
    # Of the threads that Python started, such as the saver's, the main thread waits for none here;
    # for autograd's, which are not of them, it does.
    aside = {str(t.ident) for t in threading.enumerate() if type(t) is threading.Thread}
    waits_in: Collective | None = None
    reached: dict[str, int] = {}
    # A record that another torch writes otherwise must not keep the rest from the report.
    with suppress(KeyError, TypeError, ValueError, RuntimeError):
        waits_in, reached = collectives(flight_record(), ranks_of, aside)
    return Report(phase, seconds, _place(main_thread), waits_in, reached)


def explain(reports: Mapping[int, Report], num_ranks: int) -> str:
    """The cause: ranks that do not answer; or ranks that did not come to what others wait in, and
    where they stand; or else where all stand."""
    waits = {rank: report.waits_in for rank, report in reports.items() if report.waits_in}
    silent = [rank for rank in range(num_ranks) if rank not in reports]
    missed: dict[int, str] = {}
    for collective in waits.values():
        for rank in set(collective.ranks) & reports.keys():
            if reports[rank].reached.get(collective.group, 0) < collective.number:
                missed.setdefault(rank, collective.name)
    # Who waits in another collective may be held up there, and is blamed only where all do.
    to_blame = {rank: name for rank, name in missed.items() if rank not in waits} or missed
    if silent:
        to_blame = {}
        parts = [f"{name_ranks(silent, 'does', 'do')} not answer"]
    elif to_blame:
        parts = [
            f"{name_ranks(ranks)} did not come to {name}" for name, ranks in _grouped(to_blame)
        ]
        parts += _stands(reports, to_blame)
    elif waits:
        return "; ".join(["all ranks came, yet it does not end", *_stands(reports, reports)])
    else:
        return "; ".join(_stands(reports, reports))
    names = {rank: collective.name for rank, collective in waits.items() if rank not in to_blame}
    parts += [f"{name_ranks(ranks, 'waits', 'wait')} in {name}" for name, ranks in _grouped(names)]
    return "; ".join(parts)


def collectives(
    record: Mapping[str, Any], ranks_of: Mapping[str, tuple[int, ...]], aside: set[str]
) -> tuple[Collective | None, dict[str, int]]:
    """Return the collective that a rank waits in, and those that it has reached: see `Report`.

    Args:
        record: as of `flight_record`.
        ranks_of: the groups, by name.
        aside: threads whose collectives the main thread does not wait for.
    """
    waits_in: Collective | None = None
    reached: dict[str, int] = {}
    for entry in (entry for backend in record.values() for entry in backend["entries"]):
        if entry["is_p2p"] or entry.get("thread_id") in aside:
            continue
        group, number = entry["process_group"][0], entry["collective_seq_id"]
        reached[group] = max(number, reached.get(group, 0))
        if waits_in is None and not entry["retired"] and entry["state"] != "completed":
            name = entry["profiling_name"].rpartition(":")[2].lstrip("_")
            waits_in = Collective(name, number, group, ranks_of.get(group, ()))
    return waits_in, reached


def _place(thread: int) -> str:
    """File, line and function of a thread's innermost frame outside of torch and the library."""
    innermost = sys._current_frames()[thread]
    frame: FrameType | None = innermost
    while frame and frame.f_globals.get("__name__", "").partition(".")[0] in _WAITING_MODULES:
        frame = frame.f_back
    code, line = (frame or innermost).f_code, (frame or innermost).f_lineno
    return f"{Path(code.co_filename).name}:{line} in {code.co_name}"


def _stands(reports: Mapping[int, Report], ranks: Iterable[int]) -> list[str]:
    places = {rank: f"{reports[rank].phase}, at {reports[rank].place}" for rank in ranks}
    return [f"{name_ranks(some, 'stands', 'stand')} in {place}" for place, some in _grouped(places)]


def _grouped(words: Mapping[int, str]) -> list[tuple[str, list[int]]]:
    """Ranks grouped by their text, in the order of the first such rank."""
    found: dict[str, list[int]] = {}
    for rank, word in sorted(words.items()):
        found.setdefault(word, []).append(rank)
    return list(found.items())


def name_ranks(ranks: Sequence[int], one: str = "", several: str = "") -> str:
    """Name ranks: `rank 1 does`, `ranks 0, 2 and 3 do`.

    Args:
        ranks: at least one.
        one: the verb for one rank.
        several: the verb for several.
    """
    *most, last = map(str, ranks)
    text = f"ranks {', '.join(most)} and {last} {several}" if most else f"rank {last} {one}"
    return text.strip()
