"""slurm/*.sbatch: what they start, and with which words."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.study.grid import pairs, run_words

ROOT = Path(__file__).parents[2]


def tokens(script: str) -> list[str]:
    """What the #SBATCH lines say."""
    lines = re.findall("^#SBATCH (.*)$", script, re.MULTILINE)
    return [token for line in lines for token in shlex.split(line)]


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a batch script in a repository whose `python3 -m` and `srun` print <their> <words>."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "site.sh").write_text("echo site >&2\n")
    (tmp_path / "bin").mkdir()
    show = 'printf "<%s>" "$@"'
    python = f'PYTHONPATH={ROOT} exec {sys.executable} "$@"'
    for name, text in {
        "python3": f"case $1 in -m) {show} ;; *) {python} ;; esac",
        "srun": show,
    }.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def of(script: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            **variables,
        }
        command = ["bash", str(ROOT / "slurm" / script), *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")

    return of


def marked(*words: str) -> str:
    return "".join(f"<{word}>" for word in words)


def test_batch_scripts_are_sound_and_work_unedited() -> None:
    scripts = sorted((ROOT / "slurm").glob("*.sbatch"))
    assert {script.stem for script in scripts} >= {"train", "sweep", "evaluate", "export", "study"}
    for script in scripts:
        subprocess.run(["bash", "-n", script], check=True)
        text = script.read_text()
        for line in ("set -euo pipefail", 'cd "$SLURM_SUBMIT_DIR"', ". slurm/site.sh", "# usage: "):
            assert line in text, script
        names = {token.partition("=")[0] for token in tokens(text)}
        assert {"--job-name", "--nodes", "--output"} <= names
        # Not among the files of the root; and Slurm makes no folder.
        [output] = [Path(token[9:]) for token in tokens(text) if token.startswith("--output=")]
        assert str(output.parent) == "slurm/logs" and (ROOT / output.parent).is_dir()


@pytest.mark.parametrize(
    ("index", "variables", "alpha", "seed"),
    [
        (0, {}, 0.0, 0),
        (11, {}, 15.0, 2),
        (1, {"ALPHAS": "5 2.5", "SEEDS": "7"}, 2.5, 7),
        (2, {"ALPHAS": "5.0 0", "SEEDS": "3 4"}, 5.0, 4),
    ],
)
def test_sweep_trains_the_runs_of_the_study(
    batch: Callable[..., Any],
    tmp_path: Path,
    index: int,
    variables: dict[str, str],
    alpha: float,
    seed: int,
) -> None:
    (tmp_path / "run.yaml").write_text("{model: {name_or_path: x}, run_dir: 'runs/it is'}")
    words = ["--processes", "3", "optim.schedule=linear", "--max-restarts=0"]
    done = batch("sweep.sbatch", "run.yaml", *words, SLURM_ARRAY_TASK_ID=str(index), **variables)
    assert done.returncode == 0, done.stderr
    wanted = run_words(["optim.schedule=linear"], Path("runs/it is"), alpha, seed)
    options = ["--processes", "3", "--max-restarts=0"]
    assert done.stdout == marked("-m", "neftune_dist", "launch", "run.yaml", *wanted, *options)


def test_study_evaluates_the_run_that_the_sweep_trained(batch: Callable[..., Any]) -> None:
    words = ("x.yaml", "train.seed=3", "--alphas", "0,5", "--seeds", "2")
    task = batch("study.sbatch", *words, SLURM_ARRAY_TASK_ID="2")
    study = ("--cpu-bind=none", "python3", "-m", "neftune_dist", "study", *words)
    assert task.stdout == marked(*study, "--only", "2")
    whole = batch("study.sbatch", *words, "--report-only")
    assert whole.stdout == marked(*study, "--report-only")
    assert batch("study.sbatch").returncode == 2
    assert pairs([0, 5], [3, 4])[2] == (0, 4)


def test_default_array_of_the_sweep_is_all_its_runs(batch: Callable[..., Any]) -> None:
    assert "--array=0-11" in tokens((ROOT / "slurm" / "sweep.sbatch").read_text())
    done = batch("sweep.sbatch", "x.yaml", SLURM_ARRAY_TASK_ID="12")
    assert (done.returncode, done.stdout) == (2, "")
    assert "so submit with --array=0-11." in done.stderr


@pytest.mark.parametrize(
    ("words", "variables", "sentence"),
    [
        ((), {}, "sweep: "),
        (("none.yaml",), {}, "none.yaml cannot be read"),
        (("none.yaml",), {"ALPHAS": "x"}, "sweep: could not convert string to float: 'x'"),
    ],
)
def test_sweep_refuses_in_one_sentence(
    batch: Callable[..., Any], words: tuple[str, ...], variables: dict[str, str], sentence: str
) -> None:
    done = batch("sweep.sbatch", *words, SLURM_ARRAY_TASK_ID="0", **variables)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


def test_export_runs_as_a_step_in_the_container(batch: Callable[..., Any]) -> None:
    done = batch("export.sbatch", "runs/one", "--step", 5)
    step = ("-m", "neftune_dist", "export", "runs/one")
    assert done.stdout == marked("--cpu-bind=none", "python3", *step, "--step", "5")
    container = {"NEFTUNE_DIST_CONTAINER": "apptainer exec x.sif", "NEFTUNE_DIST_PYTHON": "py"}
    done = batch("export.sbatch", "runs/one", NEFTUNE_DIST_SRUN_OPTIONS="--a --b", **container)
    inside = ("--a", "--b", "apptainer", "exec", "x.sif", "py")
    assert done.stdout == marked("--cpu-bind=none", *inside, *step)


def test_evaluate_runs_as_a_step(batch: Callable[..., Any]) -> None:
    done = batch("evaluate.sbatch", "a run", "--step", 5, "noise.alpha=5")
    step = ("-m", "neftune_dist", "evaluate", "a run", "--step", "5", "noise.alpha=5")
    assert done.stdout == marked("--cpu-bind=none", "python3", *step)
    assert batch("evaluate.sbatch").returncode == 2
