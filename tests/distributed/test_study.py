"""A study is runs that differ in alpha and seed alone, and a report that claims no more than they
show."""

from __future__ import annotations

import json
import math
import random
import shutil
import signal
import statistics
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neftune_dist import study as module
from neftune_dist.config import UserError, load_config
from neftune_dist.study import Run, interval, read_run, report, study
from tests import tiny

NUM_STEPS = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its alpha is to be overridden; its noise.seed contradicts alpha 0."""
    noise: dict[str, Any] = {"alpha": 9.0, "seed": 7}
    folder = tmp_path_factory.mktemp("study")
    return tiny.make_config(folder, noise=noise, train={"max_steps": NUM_STEPS})


@pytest.fixture(scope="module")
def finished(config: Path) -> Path:
    """The directory of a study of two values of alpha and one seed."""
    folder = config.parent / "finished"
    done = tiny.run("study", config, f"run_dir={folder}", "--alphas=0,5")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]


def test_each_run_has_its_alpha_its_seed_and_all_steps(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "alpha_0_seed_0",
        "alpha_5_seed_0",
        "report.md",
    }
    for alpha, noise_seed in ((0, None), (5, 7)):
        run_dir = finished / f"alpha_{alpha}_seed_0"
        settings = load_config(run_dir / "config.yaml")
        assert (settings.noise.alpha, settings.noise.seed) == (alpha, noise_seed)
        assert settings.train.seed == 0
        steps = tiny.steps(run_dir)
        assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
        for step in steps:
            assert step["noise_norm"] == pytest.approx(alpha / math.sqrt(3), rel=0.05)


def test_the_report_holds_what_the_runs_recorded(finished: Path) -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (finished / "report.md").read_text().splitlines()
        if line.startswith(("| 0 |", "| 5 |"))
    ]
    last = {}
    for alpha, row in ((0, rows[0]), (5, rows[1])):
        run_dir = finished / f"alpha_{alpha}_seed_0"
        steps, losses = tiny.steps(run_dir), evaluations(run_dir)
        assert [each["step"] for each in losses] == [0, NUM_STEPS]
        last[alpha] = losses[1]["held_out_loss"]
        norm = statistics.fmean(step["noise_norm"] for step in steps)
        law = alpha / math.sqrt(3)
        figures = [losses[0]["held_out_loss"], last[alpha], steps[-1]["loss"], norm, law]
        assert row == [str(alpha), *(f"{figure:.4f}" for figure in figures)]
    difference = f"{last[5] - last[0]:+.4f}"
    assert last[5] != last[0]
    assert rows[2] == ["5", difference, difference, "too few seeds"]
    text = (finished / "report.md").read_text()
    assert "- alpha 5: no difference seen: 1 seed is too few to tell noise from effect." in text


def test_a_finished_study_is_read_again_not_run_again(config: Path, finished: Path) -> None:
    files = [*finished.glob("*/*.jsonl"), finished / "report.md"]
    before = [file.read_bytes() for file in files]
    done = tiny.run("study", config, f"run_dir={finished}", "--alphas=0,5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [file.read_bytes() for file in files] == before


def test_alpha_0_twice_is_the_same_to_the_last_bit(config: Path, finished: Path) -> None:
    again = config.parent / "again"
    done = tiny.run("study", config, f"run_dir={again}", "--alphas=0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one alpha alone" in done.stdout
    one, two = finished / "alpha_0_seed_0", again / "alpha_0_seed_0"
    assert len(tiny.steps(one)) == NUM_STEPS
    assert tiny.untimed(tiny.steps(one)) == tiny.untimed(tiny.steps(two))
    assert evaluations(one) == evaluations(two)


def test_runs_go_under_torchrun(config: Path) -> None:
    folder = config.parent / "ranks"
    done = tiny.run("study", config, f"run_dir={folder}", "--alphas=2.5", "--ranks=2")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = tiny.steps(folder / "alpha_2.5_seed_0")
    assert [step["world_size"] for step in steps] == [2] * NUM_STEPS


@pytest.mark.parametrize(("ranks", "code"), [(1, 2), (2, 1)])  # torchrun makes any failure 1
def test_a_failing_run_stops_the_study_and_is_named(
    ranks: int, code: int, config: Path, tmp_path: Path
) -> None:
    words = (f"run_dir={tmp_path}", "data.source=/no/such.jsonl", f"--ranks={ranks}")
    done = tiny.run("study", config, *words, "--alphas=0,5")
    assert done.returncode == code
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"study: run 1 of 2 (alpha 0, seed 0) failed with exit code {code}: ")
    assert "data.source=/no/such.jsonl" in last
    assert not (tmp_path / "alpha_5_seed_0").exists()
    assert not (tmp_path / "report.md").exists()


def test_a_stopped_study_saves_and_says_so(config: Path, tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "train.max_steps=3000", "--alphas=0,5"]
    process = subprocess.Popen(
        tiny.command("study", config, *words),
        env=tiny.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_dir = tmp_path / "alpha_0_seed_0"
    deadline = time.monotonic() + 90
    try:
        while len(tiny.steps(run_dir)) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.terminate()  # and with it the run, which saves
        process.wait(60)
    assert process.returncode == 75
    assert "stopped; the same command continues" in errors
    step = tiny.steps(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
    assert not (tmp_path / "alpha_5_seed_0").exists()


@pytest.mark.parametrize(
    ("changes", "words", "needle"),
    [
        ({"alphas": [0, 5, 5.0]}, [], "--alphas=0,5,5"),
        ({"alphas": []}, [], "--alphas="),
        ({"alphas": [0, -1]}, [], "noise.alpha=-1"),
        ({"alphas": [0, 1001]}, [], "noise.alpha=1001"),
        ({"alphas": [0, math.nan]}, [], "noise.alpha=nan"),
        ({"num_seeds": 0}, [], "--seeds=0"),
        ({"num_ranks": 0}, [], "--ranks=0"),
        ({}, ["data.num_held_out=0"], "data.num_held_out"),
    ],
)
def test_what_cannot_be_studied_is_refused_before_the_first_run(
    changes: dict[str, Any],
    words: list[str],
    needle: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(module, "_execute", lambda command: pytest.fail("a run was started"))
    request: dict[str, Any] = {"alphas": [0, 5], "num_seeds": 1, "num_ranks": 1}
    with pytest.raises(UserError, match=needle):
        study(config, words, **(request | changes))


def test_a_study_within_torchrun_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--ranks"):
        study(config, [], alphas=[0, 5], num_seeds=1, num_ranks=1)


def test_seeds_go_up_from_that_of_the_configuration(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def execute(command: list[str]) -> tuple[int, str]:
        commands.append(command)
        run_dir = Path(command[-1].removeprefix("run_dir="))
        shutil.copytree(finished / "alpha_0_seed_0", run_dir)
        return 0, ""

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(module, "_execute", execute)
    folder = config.parent / "seeds"
    words = ["train.seed=40", f"run_dir={folder}"]
    assert study(config, words, alphas=[0.5, 3], num_seeds=2, num_ranks=1) == 0
    assert [command[-1].rpartition("/")[2] for command in commands] == [
        "alpha_0.5_seed_40",
        "alpha_3_seed_40",
        "alpha_0.5_seed_41",
        "alpha_3_seed_41",
    ]
    for command in commands:
        resolved = load_config(command[command.index("train") + 1], command[-5:])
        assert command[-1].endswith(f"/alpha_{resolved.noise.alpha:g}_seed_{resolved.train.seed}")


def test_an_unfinished_run_is_not_read(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished / "alpha_5_seed_0", run_dir)
    first, *_ = (run_dir / "evaluations.jsonl").read_text().splitlines(True)
    (run_dir / "evaluations.jsonl").write_text(first)
    with pytest.raises(UserError, match="held-out loss"):
        read_run(run_dir, 5, 0)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_run(run_dir, 5, 0)


def test_skipped_steps_are_left_out_of_the_mean(tmp_path: Path) -> None:
    def write(losses: list[float | None], held_out: list[float | None]) -> None:
        step = {"noise_norm": 1.0, "noise_law": 1.0, "num_tokens": 9, "num_supervised_tokens": 3}
        steps = [{**step, "step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
        evaluations = [
            {"step": at, "held_out_loss": loss}
            for at, loss in zip((0, len(losses)), held_out, strict=True)
        ]
        for name, records in (("metrics", steps), ("evaluations", evaluations)):
            lines = [json.dumps(record) + "\n" for record in records]
            (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    write([9.0] * 18 + [2.0, None], [4.0, 3.0])
    assert read_run(tmp_path, 5, 0).training == 2.0
    write([9.0] * 18 + [None, None], [4.0, 3.0])
    with pytest.raises(UserError, match="no finite loss"):
        read_run(tmp_path, 5, 0)
    write([9.0] * 20, [4.0, None])
    with pytest.raises(UserError, match="no finite loss"):
        read_run(tmp_path, 5, 0)


def make_runs(base: float, alpha: float, differences: list[float]) -> list[Run]:
    runs = []
    for seed, difference in enumerate(differences):
        plain = Run(base, seed, 3.0, 2.0 + seed, 1.5, 0.0, 0.0, [(1, 90, 30)])
        runs += [replace(plain, alpha=alpha, last=plain.last + difference), plain]
    return runs


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-0.03, -0.02, -0.04], "held-out loss lower by 0.0300; the interval excludes 0."),
        ([0.03, 0.02, 0.04], "held-out loss higher by 0.0300; the interval excludes 0."),
        ([-0.03, 0.02, 0.01], "no difference seen: the interval includes 0."),
        ([0.0, 0.0, 0.0], "no difference seen: the interval includes 0."),
        ([-0.5, -0.5], "no difference seen: 2 seeds are too few to tell noise from effect."),
        ([-0.5], "no difference seen: 1 seed is too few to tell noise from effect."),
    ],
)
def test_the_conclusion_claims_what_the_interval_allows(
    differences: list[float], words: str
) -> None:
    text = report(make_runs(0, 5, differences))
    assert f"- alpha 5: {words}" in text
    assert f"| 5 | {' | '.join(f'{d:+.4f}' for d in differences)} | " in text


def test_the_smallest_alpha_is_compared_with() -> None:
    text = report(make_runs(2.5, 10, [0.2, 0.1, 0.3]))
    assert "minus that of alpha 2.5" in text
    assert "- alpha 10: held-out loss higher by 0.2000" in text


def test_runs_of_other_documents_are_not_compared() -> None:
    one, two = make_runs(0, 5, [0.1])
    with pytest.raises(UserError, match="documents"):
        report([one, replace(two, steps=[(1, 91, 30)])])


def test_the_interval_is_that_of_the_mean() -> None:
    draw = random.Random(1)
    values = [draw.gauss(0.5, 2) for _ in range(200)]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    bounds = interval(values)
    assert bounds is not None and bounds == interval(values)
    assert bounds[0] == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert bounds[1] == pytest.approx(mean + 1.96 * error, abs=0.1 * error)
