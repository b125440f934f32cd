"""The records: resumed without a seam, and not lost without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.config import LoggingConfig, UserError
from neftune_dist.metrics import Recorder

QUIET = LoggingConfig(tensorboard=False, progress=False)


def record(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 1.0 / step, "step_seconds": 0.1, "tokens_per_second": 10.0}


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]


def test_a_resumed_run_drops_what_lies_beyond_its_checkpoint(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, QUIET, 0, 9, active=True)
    for step in range(1, 6):
        recorder.step(record(step))
    recorder.evaluation({"step": 0, "held_out_loss": 1.0})
    recorder.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    recorder = Recorder(tmp_path, QUIET, 3, 9, active=True)
    recorder.step(record(4))
    recorder.close()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert len((tmp_path / "evaluations.jsonl").read_text().splitlines()) == 1
    Recorder(tmp_path, QUIET, 0, 9, active=True).close()  # from the start: nothing is left
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "evaluations.jsonl").read_text() == ""


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, QUIET, 0, 9, active=False)
    recorder.step(record(1))
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_does_not_end_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(tmp_path, QUIET, 0, 9, active=True)
    recorder._files["metrics.jsonl"] = Path("/dev/full").open("a")  # noqa: SIM115 (it closes it)
    recorder.step(record(1))
    recorder.step(record(2))
    assert capsys.readouterr().err.count("No space left on device") == 1
    with pytest.raises(UserError, match="2 records could not be written"):
        recorder.close()


def test_a_run_directory_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        Recorder(tmp_path / "missing", QUIET, 0, 9, active=True)
