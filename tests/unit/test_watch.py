"""The screen of a run, from files as a run writes them, whole or not."""

from __future__ import annotations

import itertools
import json
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.cli import main
from neftune_dist.cluster.watch import screen_lines, watch
from neftune_dist.config import UserError


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 4.0 - step / 10,
        "step_seconds": 2.0,
        "num_tokens": 5000,
        "world_size": 8,
        "noise_norm": 2.8868,
        "noise_law": 2.8868,
        "grad_norm": 1.5,
        "learning_rate": 1e-4,
        "mfu": 0.45,
        "memory_gib": 70.0,
        "padding_fraction": 0.0,
        **changes,
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was killed at step 20 of 40, after a failure at step 7."""
    write(tmp_path / "metrics.jsonl", [record(step) for step in range(1, 21)])
    held_out = [{"step": step, "held_out_loss": loss} for step, loss in ((0, 4.0), (10, 2.5))]
    write(tmp_path / "evaluations.jsonl", [*held_out, {"step": 20, "held_out_loss": 2.75}])
    checkpoint = tmp_path / "checkpoints" / "step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (checkpoint / "trainer_state.json").write_text(json.dumps({"num_steps": 40}))
    for number in (1, 2):
        folder = tmp_path / "logs" / f"attempt_000{number}"
        folder.mkdir(parents=True)
        lines = f"warning: slow disk {number}\nstep {number}\n"
        (folder / "console.log").write_text(lines)
    ended = {"kind": "failed", "step": 7, "error": "out of memory", "checkpoint": 0, "when": 1.0}
    (tmp_path / "logs" / "attempt_0001" / "outcome.json").write_text(json.dumps(ended))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_screen_says_how_far_how_fast_and_what_failed(run_dir: Path) -> None:
    screen = "\n".join(screen_lines(run_dir, (run_dir / "metrics.jsonl").stat().st_mtime + 30))
    assert "step 20 of 40 (50%); 40 s left; recorded 30 s ago; newest checkpoint: 10" in screen
    assert "loss 2.0000; held out 2.7500 (step 20), best 2.5000 (step 10)" in screen
    assert "2,500 tokens/s, 2.00 s a step, world size 8, MFU 45.0%, memory 70.0 GiB" in screen
    assert "noise norm 2.8868, by the law 2.8868" in screen
    assert "attempt 1 of 2: failed at step 7: out of memory" in screen
    assert "attempt 2 of 2: under way, unless its launcher was killed" in screen
    assert "last warning: warning: slow disk 2" in screen


def test_curve_falls_from_the_greatest_to_the_least_mean(run_dir: Path) -> None:
    rows = [line for line in screen_lines(run_dir, 0.0) if "█" in line]
    assert rows[0].startswith("  3.9000 █") and rows[-1].startswith("  2.0000 █")
    assert all(len(one) <= len(other) for one, other in itertools.pairwise(rows))


def test_screen_of_a_run_without_steps_says_so(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert "no step is recorded yet" in list(screen_lines(tmp_path, 0.0))


def test_screen_survives_what_a_kill_leaves(run_dir: Path) -> None:
    """A torn line, a loss that was not finite, no checkpoint, an older version's record."""
    old = record(22, loss=None)
    del old["noise_law"], old["mfu"]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record(21)) + "\n" + json.dumps(old) + '\n{"step": 23, "lo')
    (run_dir / "checkpoints" / "step_00000010" / "trainer_state.json").write_text("{")
    (run_dir / "evaluations.jsonl").write_text('{"step": 0, "held_out_loss": null}\n')
    screen = "\n".join(screen_lines(run_dir, 0.0))
    assert (
        "step 22; recorded" in screen
        and "MFU ?" in screen
        and "loss ?" in screen
        and "by the law ?" in screen
    )


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"step_seconds": 0.0}, "? tokens/s, 0.00 s a step"),
        ({"step_seconds": None, "num_tokens": None}, "? tokens/s"),
        ({"learning_rate": "high", "grad_norm": None, "mfu": "?"}, "learning rate ?"),
        ({"world_size": None, "memory_gib": []}, "world size ?, MFU 45.0%, memory ? GiB"),
        ({"loss": 1e300}, "loss 1e+300"),
        ({"mfu": 10**400, "memory_gib": True}, "MFU ?, memory 1.0 GiB"),
    ],
)
def test_screen_shows_what_is_no_number_as_a_question_mark(
    changes: dict[str, Any], shown: str, tmp_path: Path
) -> None:
    write(tmp_path / "metrics.jsonl", [record(step, **changes) for step in (1, 2)])
    assert shown in "\n".join(screen_lines(tmp_path, 0.0))


def test_losses_may_be_as_large_as_float_holds(run_dir: Path) -> None:
    write(run_dir / "metrics.jsonl", [record(step, loss=1.5e308) for step in range(1, 300)])
    assert any(line.startswith("1.5e+308") for line in screen_lines(run_dir, 0.0))


def test_length_before_the_run_was_made_longer_is_not_shown(run_dir: Path) -> None:
    write(run_dir / "metrics.jsonl", [record(step) for step in range(1, 43)])
    assert any(line.startswith("step 42; recorded ") for line in screen_lines(run_dir, 0.0))


def test_screen_counts_damaged_lines(run_dir: Path) -> None:
    text = (run_dir / "metrics.jsonl").read_text().replace('"loss"', '"lo', 2)
    (run_dir / "metrics.jsonl").write_text(text)
    assert "damaged lines of metrics.jsonl, left out: 2" in list(screen_lines(run_dir, 0.0))


def test_screen_shows_the_last_sample_answer_in_one_line(run_dir: Path) -> None:
    rows = [
        {"step": 10, "index": i, "instruction": f"Say\n{i}.", "output": "a\tb\x1b[2J"}
        for i in (0, 1)
    ]
    write(run_dir / "samples.jsonl", rows)
    assert "sample of step 10: Say 1. -> a b\ufffd[2J" in list(screen_lines(run_dir, 0.0))


def test_summary_of_the_quickstart_prints_no_control_characters(
    run_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    answer = {"instruction": "Say.", "reference": "a", "output": "\x1b[2Jb", "correct": False}
    figures = {"held_out_loss": 1.0, "num_documents": 2}
    for name in ("before", "after"):
        folder = run_dir / "evaluations" / name
        folder.mkdir(parents=True)
        summary = {"losses": figures, "answers": {"exact_match": 0.0}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "answers.json").write_text(json.dumps([answer, answer]))
    script = Path(__file__).parents[2] / "launcher" / "summary.py"
    runpy.run_path(str(script))["main"](run_dir, run_dir / "evaluations" / "after", "again")
    said = capsys.readouterr().out
    assert "before    \ufffd[2Jb\n" in said and "\x1b" not in said


def test_other_folder_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        main(["watch", str(tmp_path)])
    assert left.value.code == 2 and "is no run directory" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["watch", __file__])
    assert left.value.code == 2 and "is a file: give the directory" in capsys.readouterr().err


def test_watch_ends_where_the_run_is_removed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(time, "sleep", lambda _: shutil.rmtree(run_dir))
    with pytest.raises(UserError, match="is no run directory"):
        watch(run_dir, 1.0, once=False)
    assert "step 20 of 40" in capsys.readouterr().out


def test_without_a_terminal_one_screen_is_printed_without_torch(run_dir: Path) -> None:
    program = (
        "import sys; from neftune_dist.cli import main\n"
        f"try: main(['watch', {str(run_dir)!r}])\n"
        "except SystemExit as left: assert not left.code\n"
        "heavy = {'torch', 'transformers', 'numpy'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.PIPE, text=True
    )
    assert "step 20 of 40" in done.stdout and "\x1b" not in done.stdout
