"""The records: resumed without a seam, and not lost without a word."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from neftune_dist.cluster.launch import supervisor
from neftune_dist.cluster.submit import preflight
from neftune_dist.config import LoggingConfig, UserError
from neftune_dist.system.records import read_records
from neftune_dist.training.metrics import Recorder, is_evaluated

QUIET = LoggingConfig(tensorboard=False, progress=False)


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "step_seconds": 0.1, "tokens_per_second": 10.0}


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]


def test_resume_drops_records_beyond_checkpoint(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, QUIET, {}, 0, 9, active=True)
    for step in range(1, 6):
        recorder.step(record(step))
    recorder.evaluation({"step": 0, "held_out_loss": 1.0})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    recorder = Recorder(tmp_path, QUIET, {}, 3, 9, active=True)
    recorder.step(record(4))
    recorder.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1
    Recorder(tmp_path, QUIET, {}, 0, 9, active=True).close()  # from the start: nothing is left
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "evaluations.jsonl").read_text() == ""


def test_non_finite_value_is_null_in_json_and_absent_from_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path, LoggingConfig(), {}, 0, 9, active=True)
    for step, loss in ((1, math.nan), (2, math.inf), (3, 0.5)):
        recorder.step({**record(step), "loss": loss, "grad_norm": -loss, "noise_norm": 0.0})
        recorder.evaluation({"step": step, "held_out_loss": loss})
    recorder.close()
    for name, key in (("metrics", "loss"), ("evaluations", "held_out_loss")):
        text = (tmp_path / f"{name}.jsonl").read_text()
        assert not re.search("NaN|Infinity", text)
        assert [json.loads(line)[key] for line in text.splitlines()] == [None, None, 0.5]
    events = EventAccumulator(str(tmp_path / "tensorboard" / tmp_path.name)).Reload()
    assert [event.step for event in events.Scalars("loss/loss")] == [3]
    assert [event.step for event in events.Scalars("speed/tokens_per_second")] == [1, 2, 3]
    out = capsys.readouterr().out
    assert "step 1/9  loss nan  grad_norm nan" in out
    assert "step 2: held-out loss inf" in out


def test_progress_bar_shows_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    recorder = Recorder(tmp_path, LoggingConfig(tensorboard=False), {}, 0, 9, active=True)
    recorder.step({**record(1), "loss": math.nan})
    recorder.close()
    assert "1/9" in (shown := capsys.readouterr().err)
    assert "loss nan" in shown


def test_is_evaluated_reads_whole_records_only(tmp_path: Path) -> None:
    assert not is_evaluated(tmp_path, 3)
    recorder = Recorder(tmp_path, QUIET, {}, 0, 9, active=True)
    recorder.evaluation({"step": 3, "held_out_loss": 1.0})
    recorder.close()
    with (tmp_path / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 6, "held_')  # killed while writing
    assert [is_evaluated(tmp_path, step) for step in (0, 3, 6)] == [False, True, False]


DAMAGED = [
    b"",  # (the line's end is left)
    bytes(40),
    b"\xff\xfe\x00",
    b'{"step": 3, "loss": 0.',
    b"3",
    b"null",
    b"[]",
    b"{}",
    b'{"loss": 1.0}',
    b'{"step": "3"}',
    b'{"step": null}',
    b'{"step": true}',
    b'{"step": -3}',
    b'{"step": 3.0}',
    b'{"step": [3]}',
    b'{"step": NaN}',
    b'{"step": 3, "loss": NaN}',
    b"[" * 100_000,
    b'{"step": ' * 20_000,
    b'{"step": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("line", DAMAGED, ids=[str(line[:20]) for line in DAMAGED])
def test_damaged_record_is_counted_and_others_kept(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path, QUIET, {}, 0, 9, active=True)
    for step in range(1, 6):
        recorder.step({**record(step), "world_size": 2})
        recorder.evaluation({"step": step, "held_out_loss": 1.0})
    recorder.close()
    for name in ("metrics", "evaluations"):
        path = tmp_path / f"{name}.jsonl"
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"".join(row + b"\n" for row in [*lines[:2], line, *lines[3:]]))
    assert [is_evaluated(tmp_path, step) for step in (2, 3, 4)] == [True, False, True]
    assert supervisor._last_step(tmp_path) == 5
    assert len(preflight._step_seconds(tmp_path / "metrics.jsonl", 2)) == 4
    capsys.readouterr()
    Recorder(tmp_path, QUIET, {}, 5, 9, active=True).close()
    said = capsys.readouterr().err
    assert f"{tmp_path / 'metrics.jsonl'} is damaged: 1 of its records are lost" in said
    assert ("evaluations.jsonl is damaged: 1 of" in said) == bool(line)  # a blank line is no record
    assert steps(tmp_path) == [1, 2, 4, 5]


@pytest.mark.parametrize("step", [b'"x"', b"[1]", b"{}", b"1e999", b"9" * 5000, b"9" * 400])
def test_record_without_a_needed_number_is_lost(step: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": null}\n{"step": 2}\n{"step": 3, "loss": ' + step + b"}\n"
    )
    found = read_records(path, ("loss",))
    assert (found.rows, found.num_lost) == ([{"step": 1, "loss": None}], 2)


def test_last_records_are_read_without_a_cut_line(tmp_path: Path) -> None:
    """Of the last bytes a line that begins before them is left out; one that was being written by
    whoever was killed is not lost, and one that lacks its end alone is there."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(10)))
    found = read_records(path, last_bytes=30)
    assert ([row["step"] for row in found.rows], found.num_lost) == ([8, 9], 0)
    for end, last in (('{"step": 10', 9), ('{"step": 10}', 10)):
        with path.open("a") as file:
            file.write(end)
        found = read_records(path)
        assert (found.rows[-1]["step"], found.num_lost) == (last, 0)
        path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(10)))


def test_missing_records_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first one on: a run that began from another one's checkpoint has no earlier ones."""
    text = "".join(json.dumps(record(step)) + "\n" for step in (4, 5, 8, 9))
    (tmp_path / "metrics.jsonl").write_text(text)
    Recorder(tmp_path, QUIET, {}, 8, 9, active=True).close()
    assert "metrics.jsonl is damaged: 2 of its records are lost" in capsys.readouterr().err
    assert steps(tmp_path) == [4, 5, 8]


BOTH = ("metrics.jsonl", "evaluations.jsonl")


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("content", [None, b"", bytes(90), b"null\n", b'{"step": 3}\n'])
def test_file_without_any_record_warns(
    name: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that goes on; a record of a step yet to come is none."""
    for name in BOTH:
        first = 1 if name == "metrics.jsonl" else 0
        text = "".join(json.dumps({"step": step}) + "\n" for step in range(first, 3))
        (tmp_path / name).write_text(text)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    Recorder(tmp_path, QUIET, {}, 2, 9, active=True, expected=BOTH).close()
    said = capsys.readouterr().err.splitlines()
    assert said == [f"warning: {tmp_path / name} is damaged: all of its records are lost"]


def test_run_without_earlier_records_does_not_warn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that begins from another run's checkpoint, and its continuation before its first
    evaluation."""
    Recorder(tmp_path, QUIET, {}, 4, 9, active=True).close()
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record(5)) + "\n")
    Recorder(tmp_path, QUIET, {}, 5, 9, active=True, expected=BOTH).close()
    assert capsys.readouterr().err == ""


def test_duplicate_and_unordered_records_are_sorted(tmp_path: Path) -> None:
    text = "".join(json.dumps(record(step)) + "\n" for step in (3, 1, 2, 3, 1))
    (tmp_path / "metrics.jsonl").write_text(text)
    Recorder(tmp_path, QUIET, {}, 3, 9, active=True).close()
    assert steps(tmp_path) == [1, 2, 3]


def test_unwritable_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written"):
        Recorder(tmp_path, QUIET, {}, 3, 9, active=True)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, QUIET, {}, 0, 9, active=False)
    recorder.step(record(1))
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_full_disk_warns_once_and_training_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path, QUIET, {}, 0, 9, active=True)
    recorder._files["metrics.jsonl"] = Path("/dev/full").open("a")  # noqa: SIM115 (it closes it)
    recorder.step(record(1))
    recorder.step(record(2))
    assert capsys.readouterr().err.count("No space left on device") == 1
    with pytest.raises(UserError, match="2 records could not be written"):
        recorder.close()


def test_unwritable_run_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        Recorder(tmp_path / "missing", QUIET, {}, 0, 9, active=True)
