"""Conclusions from the ranks' reports and measurements: pure functions, without processes."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from neftune_dist.distributed.hang_report import (
    Collective,
    Report,
    collectives,
    explain,
    name_ranks,
)
from neftune_dist.distributed.straggler import Streaks, relative_speeds

ALL = (0, 1, 2, 3)


def report(
    phase: str = "step 5: updating", *, waits: Collective | None = None, **reached: int
) -> Report:
    return Report(phase, 900.0, "here.py:1 in f", waits, reached)


def gather(number: int, group: str = "world", ranks: tuple[int, ...] = ALL) -> Collective:
    return Collective("all_gather", number, group, ranks)


WAITING = report(waits=gather(41), world=41)


def test_rank_that_did_not_come_is_named() -> None:
    late = report("step 5: waiting for data", world=40)
    assert explain({0: WAITING, 1: late, 2: WAITING, 3: WAITING}, 4) == (
        "rank 1 did not come to all_gather; rank 1 stands in step 5: waiting for data, at "
        "here.py:1 in f; ranks 0, 2 and 3 wait in all_gather"
    )


def test_ranks_that_did_not_come_to_different_places() -> None:
    late, other = report("step 5: a"), report("step 5: b")
    assert explain({0: WAITING, 1: late, 2: other, 3: late}, 4) == (
        "ranks 1, 2 and 3 did not come to all_gather; ranks 1 and 3 stand in step 5: a, at "
        "here.py:1 in f; rank 2 stands in step 5: b, at here.py:1 in f; rank 0 waits in all_gather"
    )


def test_ranks_that_do_not_answer_are_named_before_all_others() -> None:
    assert explain({0: WAITING, 2: report(world=40)}, 4) == (
        "ranks 1 and 3 do not answer; rank 0 waits in all_gather"
    )


def test_rank_held_up_elsewhere_is_not_blamed() -> None:
    """Rank 0 waits for 1, which waits for 3 in a group of their own."""
    pair = gather(7, "pair", (1, 3))
    reports = {
        0: WAITING,
        1: report(waits=pair, world=40, pair=7),
        2: WAITING,
        3: report("step 5: stuck", world=40, pair=6),
    }
    cause = explain(reports, 4)
    assert cause.startswith("rank 3 did not come to all_gather; rank 3 stands in step 5: stuck")
    assert cause.endswith("ranks 0, 1 and 2 wait in all_gather")


def test_ranks_that_wait_for_each_other_are_all_named() -> None:
    one, two = gather(7, "one", (0, 1)), gather(9, "two", (0, 1))
    reports = {0: report(waits=one, one=7, two=8), 1: report(waits=two, one=6, two=9)}
    assert explain(reports, 2).startswith("ranks 0 and 1 did not come to all_gather; ")


def test_group_counts_its_own_collectives() -> None:
    """A rank of another group has come to none of this one's, and is not missed."""
    pair = gather(7, "pair", (0, 1))
    reports = {0: report(waits=pair, pair=7), 1: report(pair=6), 2: report(), 3: report()}
    assert explain(reports, 4).startswith("rank 1 did not come")


def test_all_came() -> None:
    assert explain(dict.fromkeys(ALL, WAITING), 4) == (
        "all ranks came, yet it does not end; ranks 0, 1, 2 and 3 stand in step 5: updating, at "
        "here.py:1 in f"
    )


def test_places_are_reported_without_a_flight_record() -> None:
    stuck = report("step 5: waiting for data")
    assert explain({0: report(), 1: stuck}, 2) == (
        "rank 0 stands in step 5: updating, at here.py:1 in f; rank 1 stands in step 5: waiting "
        "for data, at here.py:1 in f"
    )


def test_cause_holds_neither_times_nor_counts() -> None:
    """It is compared with that of the next attempt, which began at another step."""
    late = Report("step 5: updating", 901.0, "here.py:1 in f", None, {"world": 11})
    again = Report("step 5: updating", 950.0, "here.py:1 in f", None, {"world": 3})
    one = explain({0: report(waits=gather(12), world=12), 1: late}, 2)
    assert one == explain({0: report(waits=gather(4), world=4), 1: again}, 2)


def test_reports_travel() -> None:
    for sent in (WAITING, report(world=3)):
        assert Report.from_dict(json.loads(json.dumps(asdict(sent)))) == sent


def entry(
    number: int, *, state: str = "scheduled", retired: bool = False, thread: str = "1", **more: Any
) -> dict[str, Any]:
    """As torch writes it down."""
    return {
        "process_group": ["0", "default_pg"],
        "collective_seq_id": number,
        "profiling_name": "nccl:_all_gather_base",
        "is_p2p": False,
        "state": state,
        "retired": retired,
        "thread_id": thread,
        **more,
    }


@pytest.mark.parametrize(
    ("entries", "waits_in", "reached"),
    [
        ([], None, {}),
        ([entry(1, retired=True), entry(2, state="completed")], None, {"0": 2}),
        # NCCL's are begun ahead of time: the oldest is waited for, the newest has been reached.
        ([entry(1, retired=True), entry(2, state="started"), entry(3), entry(4)], 2, {"0": 4}),
        ([entry(1), entry(9, thread="saver")], 1, {"0": 1}),
        ([entry(9, is_p2p=True), entry(2)], 2, {"0": 2}),
        ([entry(8, retired=True), entry(7, retired=True)], None, {"0": 8}),
    ],
)
def test_oldest_open_and_newest_reached_collective_of_a_record(
    entries: list[dict[str, Any]], waits_in: int | None, reached: dict[str, int]
) -> None:
    expected = None if waits_in is None else Collective("all_gather_base", waits_in, "0", ALL)
    found = collectives({"nccl": {"entries": entries}}, {"0": ALL}, {"saver"})
    assert found == (expected, reached)


def test_records_of_both_backends_count() -> None:
    other = entry(5, process_group=["1", "other"], profiling_name="gloo:all_reduce")
    record = {"nccl": {"entries": [entry(3, retired=True)]}, "gloo": {"entries": [other]}}
    found = collectives(record, {"1": (0, 2)}, set())
    assert found == (Collective("all_reduce", 5, "1", (0, 2)), {"0": 3, "1": 5})


def test_names_of_ranks() -> None:
    assert name_ranks([3], "does", "do") == "rank 3 does"
    assert name_ranks([0, 2], "does", "do") == "ranks 0 and 2 do"
    assert name_ranks([0, 2, 7]) == "ranks 0, 2 and 7"


def test_speeds_are_the_median_ranks() -> None:
    assert relative_speeds([1.0, 1.0, 2.0, 1.0]) == [1.0, 1.0, 0.5, 1.0]
    assert relative_speeds([4.0, 1.0]) == [0.25, 1.0]  # of two ranks, the faster one is right
    assert relative_speeds([2.0, 2.0]) == [1.0, 1.0]


def test_streak_is_reported_once_when_it_is_long_enough() -> None:
    streaks = Streaks(2)
    slow = [True, True, True, True, False, True, True, False, True, True, True]
    reported = [streaks.lasting([False, now]) for now in slow]
    assert [i for i, ranks in enumerate(reported) if ranks] == [2, 10]
    assert reported[2] == reported[10] == [1]
