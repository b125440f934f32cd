"""Reports of how ranks ended, the outcome of an attempt, and the decision to restart."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from neftune_dist.config import UserError
from neftune_dist.distributed import outcome as attempt
from neftune_dist.distributed.outcome import (
    DONE,
    FAILED,
    FINAL,
    LOST,
    MISTAKE,
    ORPHANED,
    RUNNING,
    STOPPED,
    Outcome,
    Verdict,
    verdict,
)


def concluded(folder: Path, **ranks: tuple[str, str]) -> Outcome:
    """The attempt's outcome where its ranks, `r0` and so on, left these words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(attempt.VARIABLE, str(folder))
        for name, (kind, error) in ranks.items():
            attempt.tell(int(name[1:]), kind, error=error)
    return attempt.conclude(folder, 7, 5, "srun ended with code 1")


@pytest.mark.parametrize(
    ("ranks", "kind", "error"),
    [
        ({"r0": (DONE, ""), "r1": (DONE, "")}, DONE, ""),
        ({"r0": (STOPPED, ""), "r1": (STOPPED, "")}, STOPPED, ""),
        ({"r0": (DONE, ""), "r1": (STOPPED, "")}, STOPPED, ""),
        (
            {"r0": (MISTAKE, "no such file"), "r1": (MISTAKE, "no such file")},
            MISTAKE,
            "no such file",
        ),
        ({"r0": (ORPHANED, "closed"), "r1": (FAILED, "boom")}, FAILED, "boom"),
        ({"r0": (FAILED, "first"), "r1": (FAILED, "second")}, FAILED, "first"),
        ({"r0": (FAILED, "first"), "r1": (FINAL, "diverged")}, FINAL, "diverged"),
        ({"r0": (LOST, "n2 did not come"), "r1": (STOPPED, "")}, LOST, "n2 did not come"),
        ({"r0": (ORPHANED, "closed"), "r1": (ORPHANED, "reset")}, FAILED, "closed"),
        ({}, LOST, "srun ended with code 1"),
    ],
)
def test_cause_is_the_gravest_and_earliest_failure(
    ranks: dict[str, tuple[str, str]], kind: str, error: str, tmp_path: Path
) -> None:
    outcome = concluded(tmp_path, **ranks)
    assert (outcome.kind, outcome.error) == (kind, error)
    assert (outcome.step, outcome.checkpoint) == (7, 5)


def test_earliest_failure_is_that_of_the_older_file(tmp_path: Path) -> None:
    """The clocks of nodes differ."""
    concluded(tmp_path, r0=(FAILED, "lost another"), r1=(FAILED, "the cause"))
    os.utime(tmp_path / "rank_1.json", (1, 1))
    assert attempt.conclude(tmp_path, 7, 5, "").error == "the cause"


def test_rank_without_a_report_of_its_end_is_the_cause(tmp_path: Path) -> None:
    outcome = concluded(tmp_path, r0=(ORPHANED, "closed"), r1=(RUNNING, ""), r2=(RUNNING, ""))
    assert outcome.kind == FAILED
    assert outcome.error == "ranks 1, 2 died without a report: killed from outside, or crashed"


def test_first_failure_of_a_rank_is_kept(tmp_path: Path) -> None:
    assert concluded(tmp_path, r0=(RUNNING, "")).error.startswith("rank 0 died")
    assert concluded(tmp_path, r0=(FAILED, "boom")).error == "boom"
    assert concluded(tmp_path, r0=(DONE, "")).error == "boom"


def test_without_a_launcher_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(attempt.VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert not attempt.tell(0, DONE)
    assert list(tmp_path.iterdir()) == []
    assert attempt.folder_of_run(Path("run")) == Path("run/logs")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no"), MISTAKE),
        (ValueError("boom"), FAILED),
        (RuntimeError("gloo: Connection closed by peer [10.0.0.1]:5"), ORPHANED),
        (ConnectionResetError("by the other side"), ORPHANED),
    ],
)
def test_error_of_a_rank_is_reported_by_its_kind(
    error: Exception, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(attempt.VARIABLE, str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises((type(error), SystemExit)), attempt.reported():
        raise error
    assert attempt.conclude(tmp_path, 0, 0, "").kind == (FAILED if kind == ORPHANED else kind)
    assert f'"kind": "{kind}"' in (tmp_path / "rank_0.json").read_text()


def test_attempts_are_numbered(tmp_path: Path) -> None:
    names = [attempt.begin(tmp_path).name for _ in range(3)]
    assert names == ["attempt_0001", "attempt_0002", "attempt_0003"]
    attempt.conclude(tmp_path / "logs" / "attempt_0002", 3, 2, "gone")
    # The batch script of the first died with its machine; the third goes on.
    assert [outcome.kind for outcome in attempt.outcomes(tmp_path)] == [LOST, LOST, LOST]
    assert attempt.outcomes(tmp_path)[1].checkpoint == 2
    for number in (9999, 10000):
        (tmp_path / "logs" / f"attempt_{number}").mkdir()
    assert [folder.name for folder in attempt.folders(tmp_path)][-2:] == [
        "attempt_9999",
        "attempt_10000",
    ]
    assert attempt.begin(tmp_path).name == "attempt_10001"


def test_launcher_judges_its_own_attempt(tmp_path: Path) -> None:
    """Another that was started meanwhile, and refused, has a later number."""
    own, other = (attempt.begin(tmp_path) for _ in range(2))
    attempt.conclude(own, 7, 5, "rank 1 died")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(attempt.VARIABLE, str(other))
        attempt.tell(0, MISTAKE, error="run_dir is in use by another run.")
    attempt.conclude(other, 7, 5, "")
    assert [outcome.kind for outcome in attempt.outcomes(tmp_path)] == [LOST, MISTAKE]
    assert [outcome.kind for outcome in attempt.outcomes(tmp_path, own)] == [LOST]
    assert verdict(attempt.outcomes(tmp_path, own), 3).again


def of(kind: str, checkpoint: int = 0, step: int = 0, error: str = "") -> Outcome:
    return Outcome(kind, step, error, checkpoint)


@pytest.mark.parametrize(
    ("past", "again", "code"),
    [
        ([of(DONE)], False, 0),
        ([of(MISTAKE)], False, 2),
        ([of(FINAL)], False, 1),
        ([of(STOPPED, 5)], True, 75),
        ([of(FAILED, 5, 7, "boom")], True, 1),
        # The same failure at the same step, twice.
        ([of(FAILED, 5, 7, "boom"), of(FAILED, 5, 7, "boom")], False, 1),
        ([of(FAILED, 5, 7, "boom"), of(FAILED, 5, 8, "boom")], True, 1),
        ([of(FAILED, 5, 7, "boom"), of(FAILED, 5, 7, "bang")], True, 1),
        ([of(LOST, 5, 7), of(LOST, 5, 7)], True, 1),
        # Two restarts in a row without a new checkpoint are allowed, not three.
        ([of(STOPPED, 5), of(STOPPED, 5), of(STOPPED, 5)], True, 75),
        ([of(STOPPED, 5), of(STOPPED, 5), of(STOPPED, 5), of(STOPPED, 5)], False, 1),
        ([of(LOST), of(LOST)], True, 1),
        ([of(LOST), of(FAILED), of(STOPPED)], False, 1),
        # What another launcher was refused counts for nothing.
        ([of(FAILED, 5, 7, "boom"), of(MISTAKE, 5), of(FAILED, 5, 7, "boom")], False, 1),
        ([of(STOPPED, 5), *[of(MISTAKE, 5)] * 9, of(STOPPED, 5)], True, 75),
        # A new checkpoint resets the count, however long the history.
        ([*[of(FAILED, 5, i) for i in range(9)], of(FAILED, 6, 9)], True, 1),
        # An older one does not: a run that was begun again in the same folder.
        ([of(STOPPED, 9), of(STOPPED, 5), of(STOPPED, 6), of(STOPPED, 7)], False, 1),
        ([of(STOPPED, 9), of(FAILED, 5, 1), of(FAILED, 5, 2), of(FAILED, 5, 3)], False, 1),
    ],
)
def test_restart_needs_progress(past: list[Outcome], again: bool, code: int) -> None:
    decided = verdict(past, max_restarts=2)
    assert (decided.again, decided.code) == (again, code)


def test_no_restart_where_none_is_allowed() -> None:
    assert verdict([of(FAILED, 0, 3, "boom")], max_restarts=0) == Verdict(
        False, 1, "failed after step 3: boom; the last 1 attempts published no new checkpoint"
    )
