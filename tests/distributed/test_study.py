"""A study is runs that differ in alpha and seed alone, evaluated alike, and a report of what they
recorded. What a report may claim: tests/unit/test_study.py."""

from __future__ import annotations

import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.config import UserError, differences, load_config
from neftune_dist.evaluation.win_rate import Judgement
from neftune_dist.study import grid
from neftune_dist.study import run as verb
from neftune_dist.study.results import read_run
from neftune_dist.study.run import study
from tests.support import tiny_model

NUM_STEPS = 3
RUNS = ("alpha_0_seed_0", "alpha_5_seed_0", "alpha_0_seed_1", "alpha_5_seed_1")


def forked(command: Sequence[str]) -> tuple[int, str]:
    """In place of `grid.execute`: the same command in a process that has imported everything."""
    assert command[:3] == [sys.executable, "-m", "neftune_dist"]
    done = tiny_model.run_forked(command[3], *command[4:])
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its alpha is to be overridden; its noise.seed contradicts alpha 0."""
    noise: dict[str, Any] = {"alpha": 9.0, "seed": 7}
    evaluate = {"max_instructions": 8, "max_new_tokens": 4, "train_documents": 8}
    folder = tmp_path_factory.mktemp("study")
    return tiny_model.make_config(
        folder, noise=noise, evaluate=evaluate, train={"max_steps": NUM_STEPS}
    )


@pytest.fixture(scope="module")
def finished(config: Path) -> Iterator[Path]:
    """The directory of a study of two values of alpha and two seeds."""
    folder = config.parent / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK", raising=False)
        patch.setattr(grid, "execute", forked)
        code = study(config, [f"run_dir={folder}"], alphas=[0, 5], num_seeds=2, num_ranks=1)
    assert code == 0
    yield folder


def losses(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]


def evaluated(run_dir: Path, name: str) -> Any:
    return json.loads((grid.evaluation_folder(run_dir, NUM_STEPS) / f"{name}.json").read_text())


def test_every_run_has_its_alpha_seed_and_steps(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *RUNS,
        "neftune_study.json",
        "plots",
        "report.md",
        "report.html",
        "answers.md",
        "answers.html",
    }
    for name in RUNS:
        alpha, seed = float(name.split("_")[1]), int(name.split("_")[3])
        settings = load_config(finished / name / "config.yaml")
        assert (settings.noise.alpha, settings.noise.seed) == (alpha, 7 if alpha else None)
        assert settings.train.seed == seed
        steps = tiny_model.steps(finished / name)
        assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
        for step in steps:
            assert step["noise_norm"] == pytest.approx(alpha / math.sqrt(3), rel=0.05)
        summary = evaluated(finished / name, "summary")
        assert (summary["subject"]["step"], summary["subject"]["alpha"]) == (NUM_STEPS, alpha)
        assert summary["answers"]["num"] == 8


def test_runs_of_one_seed_differ_in_noise_alone(finished: Path) -> None:
    """To the last bit: the loss before the first step, and the documents of every step."""
    read = {name: read_run(finished / name, 0, 0) for name in RUNS}
    assert len({run.first for run in read.values()}) == 1
    for seed in (0, 1):
        zero, five = read[f"alpha_0_seed_{seed}"], read[f"alpha_5_seed_{seed}"]
        assert zero.documents == five.documents
        changed = differences(zero.config.to_dict(), five.config.to_dict())
        assert changed == ["noise.alpha", "noise.seed", "run_dir"]
        assert [s["learning_rate"] for s in zero.steps] == [s["learning_rate"] for s in five.steps]
        # The first batch's loss differs by its noise alone.
        assert zero.steps[0]["loss"] != five.steps[0]["loss"]
        assert zero.last != five.last
    assert read["alpha_0_seed_0"].documents != read["alpha_0_seed_1"].documents


def test_the_report_holds_what_the_runs_recorded(finished: Path) -> None:
    text = (finished / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    columns = []
    for alpha in (0, 5):
        folders = [finished / f"alpha_{alpha}_seed_{seed}" for seed in (0, 1)]
        figures = [
            [losses(f)[0]["held_out_loss"] for f in folders],
            [losses(f)[1]["held_out_loss"] for f in folders],
            [tiny_model.steps(f)[-1]["loss"] for f in folders],
            [statistics.fmean(s["noise_norm"] for s in tiny_model.steps(f)) for f in folders],
            [alpha / math.sqrt(3)],
        ]
        columns.append([f"{statistics.fmean(values):.4f}" for values in figures])
    [first] = [i for i, row in enumerate(rows) if row[0] == "held-out loss before training"]
    assert [row[1:] for row in rows[first : first + 5]] == [
        list(row) for row in zip(*columns, strict=True)
    ]
    assert rows[first - 2] == ["", "alpha 0", "alpha 5"]
    by_seed = []
    for seed in (0, 1):
        sums = [evaluated(finished / f"alpha_{a}_seed_{seed}", "items")["held_out"] for a in (5, 0)]
        means = [sum(row[0] for row in rows) / sum(row[1] for row in rows) for rows in sums]
        by_seed.append(means[0] - means[1])
    assert ["held-out loss", "5", *(f"{difference:+.4f}" for difference in by_seed)] in rows
    assert "2 seeds are too few to tell it from chance" in text
    assert "no judge is configured" in text and "`evaluate.tasks` names none" in text


def test_finished_study_is_reported_without_running(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "execute", forked)
    files = [
        *finished.glob("*/*.jsonl"),
        *finished.glob("*/evaluations/*/*"),
        *finished.glob("*.*"),
    ]
    before = [file.read_bytes() for file in files]
    times = [file.stat().st_mtime_ns for file in finished.glob("*/evaluations/*/summary.json")]
    words = [f"run_dir={finished}"]
    assert study(config, words, alphas=[0, 5], num_seeds=2, num_ranks=1) == 0
    assert [file.read_bytes() for file in files] == before
    summaries = finished.glob("*/evaluations/*/summary.json")
    assert [file.stat().st_mtime_ns for file in summaries] == times and len(times) == len(RUNS)


def test_alpha_0_is_reproducible_bit_for_bit(
    config: Path,
    finished: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grid, "execute", forked)
    again = config.parent / "again"
    code = study(config, [f"run_dir={again}"], alphas=[0], num_seeds=1, num_ranks=1)
    said = capfd.readouterr()
    assert code == 0, said
    assert "Only one alpha was studied" in said.out
    one, two = finished / "alpha_0_seed_0", again / "alpha_0_seed_0"
    assert len(tiny_model.steps(one)) == NUM_STEPS
    assert tiny_model.untimed(tiny_model.steps(one)) == tiny_model.untimed(tiny_model.steps(two))
    assert losses(one) == losses(two)
    for name in ("items", "answers"):
        found = [evaluated(run, name) for run in (one, two)]
        for rows in found if name == "answers" else []:
            for row in rows:
                row.pop("generator")
        assert found[0] == found[1]


@pytest.mark.parametrize(("ranks", "code"), [(1, 2), (2, 1)])  # torchrun makes any failure 1
def test_failed_run_stops_the_study_and_is_named(
    ranks: int, code: int, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"run_dir={tmp_path}", "data.source=/no/such.jsonl"]
    assert study(config, words, alphas=[0, 5], num_seeds=1, num_ranks=ranks) == code
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"study: run 1 of 2 (alpha 0, seed 0) failed with exit code {code}: ")
    assert "data.source=/no/such.jsonl" in last
    assert not (tmp_path / "alpha_5_seed_0").exists()
    assert not (tmp_path / "report.md").exists()


def test_stopped_study_saves_and_exits_75(config: Path, tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path}", "train.max_steps=3000", "--alphas=0,5"]
    process = subprocess.Popen(
        tiny_model.command("study", config, *words),
        env=tiny_model.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    run_dir = tmp_path / "alpha_0_seed_0"
    deadline = time.monotonic() + 90
    try:
        while len(tiny_model.steps(run_dir)) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        process.terminate()  # and with it the run, which saves
        process.wait(60)
    assert process.returncode == 75
    assert "stopped; the same command continues" in errors
    step = tiny_model.steps(run_dir)[-1]["step"]
    assert (run_dir / "checkpoints" / f"step_{step:08d}").is_dir()
    assert not (run_dir / "evaluations").exists()
    assert not (tmp_path / "alpha_5_seed_0").exists()


@pytest.mark.parametrize(
    ("changes", "words", "needle"),
    [
        ({"alphas": [0, 5, 5.0]}, [], "--alphas=0,5,5"),
        ({"alphas": [0, -1]}, [], "noise.alpha=-1"),
        ({"alphas": [0, 1001]}, [], "noise.alpha=1001"),
        ({"alphas": [0, math.nan]}, [], "noise.alpha=nan"),
        ({"only": 2}, [], "--only=2: the runs of this study are 0 to 1"),
        ({"only": -1}, [], "--only=-1"),
        ({}, ["data.num_held_out=0", "evaluate.max_instructions=200"], "data.num_held_out"),
        ({"num_seeds": 2}, [f"train.seed={2**63 - 1}"], "train.seed=9223372036854775808 is out"),
        ({}, ["evaluate.tasks=mmluu"], "lm-eval has no task mmluu; did you mean mmlu"),
        ({}, ["evaluate.tasks=a=missing.jsonl"], "missing.jsonl does not exist"),
    ],
)
def test_unusable_settings_are_refused_before_the_first_run(
    changes: dict[str, Any],
    words: list[str],
    needle: str,
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grid, "execute", lambda command: pytest.fail("a run was started"))
    request: dict[str, Any] = {"alphas": [0, 5], "num_seeds": 1, "num_ranks": 1}
    with pytest.raises(UserError, match=needle):
        study(config, words, **(request | changes))


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("peft", ["adapter.method=lora"]),
        ("lm_eval", ["evaluate.tasks=mmlu"]),
        ("rouge_score", ["evaluate.instructions=held_out"]),
        ("alpaca_eval", ["judge.annotator=alpaca_eval_gpt4", "evaluate.instructions=held_out"]),
    ],
)
def test_missing_package_is_named_before_the_first_run(
    package: str, words: list[str], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "execute", lambda command: pytest.fail("a run was started"))
    monkeypatch.setitem(sys.modules, package, None)
    words = [*words, f"run_dir={tmp_path / 'study'}"]
    with pytest.raises(UserError, match=f"needs the package {package}: pip install"):
        study(config, words, alphas=[0, 5], num_seeds=1, num_ranks=1)
    assert not (tmp_path / "study").exists()


def test_study_within_torchrun_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--ranks"):
        study(config, [], alphas=[0, 5], num_seeds=1, num_ranks=1)


@pytest.fixture
def commands(finished: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a study starts; instead of training, a finished run is copied."""
    started: list[list[str]] = []

    def execute(command: Sequence[str]) -> tuple[int, str]:
        started.append(list(command))
        if "train" in command:
            target = Path(command[-1].removeprefix("run_dir="))
            shutil.copytree(finished / "alpha_0_seed_0", target)
        return 0, ""

    monkeypatch.setattr(grid, "execute", execute)
    return started


def test_seeds_count_up_from_train_seed(
    config: Path, tmp_path: Path, commands: list[list[str]]
) -> None:
    words = ["train.seed=40", f"run_dir={tmp_path}", "evaluate.max_new_tokens=5"]
    assert study(config, words, alphas=[0.5, 3], num_seeds=2, num_ranks=2) == 0
    train, evaluate = commands[::2], commands[1::2]
    names = ["alpha_0.5_seed_40", "alpha_3_seed_40", "alpha_0.5_seed_41", "alpha_3_seed_41"]
    assert [Path(command[-1]).name for command in train] == names
    for command, name in zip(train, names, strict=True):
        assert "--nproc_per_node=2" in command
        resolved = load_config(command[command.index("train") + 1], command[-6:])
        assert name == f"alpha_{resolved.noise.alpha:g}_seed_{resolved.train.seed}"
    for command, name in zip(evaluate, names, strict=True):
        assert "--nproc_per_node=2" in command
        subject = command.index("evaluate") + 1
        assert command[subject] == str(tmp_path / name)
        asked = load_config(config, command[subject + 1 :])
        assert asked.evaluate == load_config(config, words).evaluate
        assert asked.judge == load_config(config).judge


def test_only_makes_one_run_of_a_job_array(
    config: Path, tmp_path: Path, commands: list[list[str]]
) -> None:
    request: dict[str, Any] = {"alphas": [0, 5], "num_seeds": 2, "num_ranks": 1}
    words = [f"run_dir={tmp_path}"]
    for number, name in enumerate(RUNS):
        with pytest.raises(UserError, match=f"{name} is missing: .* without --report-only"):
            study(config, words, **request, report_only=True)
        assert study(config, words, **request, only=number) == 0
        made = {path.name for path in tmp_path.iterdir()} - {"neftune_study.json"}
        assert made == set(RUNS[: number + 1])
    assert len(commands) == 2 * len(RUNS)
    with pytest.raises(UserError, match=r"made with optim.learning_rate=\S+, not 0.5: restore it"):
        study(config, [*words, "optim.learning_rate=0.5"], **request, report_only=True)
    with pytest.raises(UserError, match=r"made with evaluate.max_new_tokens=4, not 5: restore it"):
        study(config, [*words, "evaluate.max_new_tokens=5"], **request, report_only=True)
    # The copies are all of alpha 0 and seed 0, and are taken for what their directories say.
    # The runs have the dtype that was decided where the study asks for auto.
    assert study(config, [*words, "model.dtype=auto"], **request, report_only=True) == 0
    assert (tmp_path / "report.html").exists() and len(commands) == 2 * len(RUNS)


@pytest.mark.parametrize("name", ["report.md", "plots"])
def test_foreign_report_is_not_overwritten(
    name: str, config: Path, tmp_path: Path, commands: list[list[str]]
) -> None:
    (tmp_path / name).mkdir()
    request: dict[str, Any] = {"alphas": [0, 5], "num_seeds": 2, "num_ranks": 1}
    with pytest.raises(UserError, match=f"holds {name}, but no neftune_study.json"):
        study(config, [f"run_dir={tmp_path}"], **request)
    assert not commands and [path.name for path in tmp_path.iterdir()] == [name]


def test_judge_compares_answers_of_the_same_seed(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request: dict[str, Any] = {"alphas": [0, 5], "num_seeds": 2, "num_ranks": 1}
    words = [f"run_dir={finished}", "judge.url=http://127.0.0.1:9", "judge.model=m"]
    outputs = {
        name: [row["output"] for row in evaluated(finished / name, "answers")] for name in RUNS
    }

    def compare(ours: Any, theirs: Any, judge: Any, folder: Path, log: Any) -> list[Judgement]:
        assert (judge.model, folder) == ("m", finished / "judgements")
        said = [[row["output"] for row in rows] for rows in (ours, theirs)]
        assert said[0] == outputs["alpha_5_seed_0"] + outputs["alpha_5_seed_1"]
        assert said[1] == outputs["alpha_0_seed_0"] + outputs["alpha_0_seed_1"]
        # Ours all win at seed 0, and one of them at seed 1.
        return [
            Judgement(row["instruction"], 2.0 if i <= 8 else 1.0, 9, 9)
            for i, row in enumerate(ours)
        ]

    before = (finished / "report.md").read_bytes()
    monkeypatch.setattr(verb, "compare", compare)
    assert study(config, words, **request, report_only=True) == 0
    text = (finished / "report.md").read_text()
    assert "| win rate | 5 | +50.00 | -37.50 |" in text
    assert "| 5 | 1 | 12.5 % |" in text
    assert "no judge is configured" not in text

    folders = []

    def by_package(ours: Any, theirs: Any, judge: Any, folder: Path, log: Any) -> list[Judgement]:
        folders.append((folder.name, len(ours), len(theirs)))
        return [Judgement(row["instruction"], 1.5, 9, 9) for row in ours]

    monkeypatch.setattr(verb, "compare", by_package)
    words[1:] = ["judge.annotator=a"]
    assert study(config, words, **request, report_only=True) == 0
    assert folders == [("alpha_5_seed_0", 8, 8), ("alpha_5_seed_1", 8, 8)]

    def fail(*_: Any) -> list[Judgement]:
        raise UserError("No key.")

    monkeypatch.setattr(verb, "compare", fail)
    with pytest.raises(UserError, match="No key"):
        study(config, words, **request, report_only=True)
    text = (finished / "report.md").read_text()
    assert "the judge was not available. No key." in text and "## Losses" in text
    assert study(config, [f"run_dir={finished}"], **request, report_only=True) == 0
    assert (finished / "report.md").read_bytes() == before


def test_unfinished_run_is_refused(finished: Path, tmp_path: Path) -> None:
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
    (tmp_path / "config.yaml").write_text("model: {name_or_path: m}\n")

    def write(training: list[float | None], held_out: list[float | None]) -> None:
        step = {"noise_norm": 1.0, "noise_law": 1.0, "num_tokens": 9, "num_supervised_tokens": 3}
        steps = [{**step, "step": i + 1, "loss": loss} for i, loss in enumerate(training)]
        evaluations = [
            {"step": at, "held_out_loss": loss}
            for at, loss in zip((0, len(training)), held_out, strict=True)
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
