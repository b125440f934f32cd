"""The best checkpoint is kept, found and the same after a resume; a run without progress ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from safetensors.torch import load_file

from neftune_dist.checkpoint import choice, store
from neftune_dist.checkpoint.listing import contents
from neftune_dist.cli import main
from tests.support import tiny_model
from tests.support.tiny_model import Forked

# So large a rate that the held-out loss rises again within the run.
_WORDS = [
    "optim.learning_rate=0.2",
    "optim.schedule=constant",
    "evaluate.every_steps=1",
    "checkpoint.keep_best=true",
]
_WORDS += ["checkpoint.keep=1", "checkpoint.every_steps=4"]
_READ_BY = "NAME is the model's own. torch alone reads it:"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.make_config(tmp_path_factory.mktemp("best"))


@pytest.fixture(scope="module")
def run_dir(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("best-run") / "run"
    train(config, run_dir, *_WORDS)
    return run_dir


def train(config: Path, run_dir: Path, *words: str) -> str:
    done = Forked("train", config, f"run_dir={run_dir}", *words, ranks=1).wait()
    assert done.returncode == 0, done.stdout
    return str(done.stdout)


def losses(run_dir: Path) -> dict[int, float]:
    lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["held_out_loss"] for record in records}


def test_best_checkpoint_is_kept_beside_the_newest(run_dir: Path) -> None:
    found = losses(run_dir)
    best = min(found, key=lambda step: found[step])
    assert 0 < best < 10  # else the case shows nothing
    assert [checkpoint.step for checkpoint in store.find_all(run_dir)] == [10, best]
    assert choice.choose(run_dir, "best").step == best


def test_export_of_the_best_is_that_of_its_step(run_dir: Path, tmp_path: Path) -> None:
    step = choice.choose(run_dir, "best").step
    exports = {"--best": tmp_path / "best", f"--step={step}": tmp_path / "step"}
    for word, output in exports.items():
        with pytest.raises(SystemExit) as left:
            main(["export", str(run_dir), word, f"--output={output}"])
        assert left.value.code == 0
    one, other = (load_file(output / "model.safetensors") for output in exports.values())
    assert all(bool((one[name] == other[name]).all()) for name in one | other)


def test_contents_say_how_torch_alone_reads_a_checkpoint(run_dir: Path) -> None:
    """The printed lines are run as they stand."""
    lines = contents(run_dir)
    program = "\n".join(line.removeprefix("  ") for line in lines[lines.index(_READ_BY) + 1 :])
    found: dict[str, Any] = {}
    exec(program, found)
    exported = run_dir / "read-by-torch"
    with pytest.raises(SystemExit):
        main(["export", str(run_dir), f"--output={exported}"])
    weights = load_file(exported / "model.safetensors")
    for name, weight in weights.items():
        read = found["state"][f"master/{name}"].view(found["shapes"][name])
        assert (read.to(weight.dtype) == weight).all(), name
    assert len(found["state"]) == 3 * len(weights)


def test_push_reserves_first_then_uploads_the_export(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a double of its client's three functions."""
    calls: list[tuple[str, Any]] = []

    def create(repository: str, *, private: bool, exist_ok: bool) -> None:
        assert private and exist_ok and not output.exists()
        calls.append(("create", repository))

    def check(repository: str, *, write: bool) -> None:
        assert write and not output.exists()
        calls.append(("check", repository))

    def upload(*, repo_id: str, folder_path: Path, ignore_patterns: list[str], **_: Any) -> str:
        kept = {path.name for path in folder_path.iterdir()} - {*ignore_patterns}
        assert {"model.safetensors", "config.json", "README.md"} <= kept
        assert "neftune_export.json" not in kept
        calls.append(("upload", repo_id))
        return "the commit"

    output = tmp_path / "pushed"
    monkeypatch.setattr(huggingface_hub, "create_repo", create)
    monkeypatch.setattr(huggingface_hub, "auth_check", check)
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload)
    words = ["export", str(run_dir), f"--output={output}", "--push-to-hub=me/tuned"]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    assert calls == [(name, "me/tuned") for name in ("create", "check", "upload")]


@pytest.mark.parametrize("words", [["--step=3"], ["--adapter"], ["--output=."]])
def test_export_that_is_refused_reserves_nothing(
    words: list[str], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "create_repo", pytest.fail)
    with pytest.raises(SystemExit) as left:
        main(["export", str(run_dir), *words, "--push-to-hub=me/tuned"])
    assert left.value.code == 2


@pytest.mark.parametrize("name", ["me/tuned", "tuned", "a/b/c"])
def test_push_that_the_hub_refuses_writes_nothing(
    name: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In tests the hub is out of reach, which is a refusal like that of a token without rights."""
    output = tmp_path / "pushed"
    with pytest.raises(SystemExit) as left:
        main(["export", str(run_dir), f"--output={output}", f"--push-to-hub={name}"])
    assert left.value.code == 2 and not output.exists()
    assert f"--push-to-hub={name}" in capsys.readouterr().err


def test_best_that_was_not_kept_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    best = choice.choose(run_dir, "best").folder.name
    other = shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(other / "checkpoints" / best)
    with pytest.raises(SystemExit) as left:
        main(["export", str(other), "--best"])
    assert left.value.code == 2 and "checkpoint.keep_best=true" in capsys.readouterr().err


def test_best_and_step_together_exit_2(run_dir: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["export", str(run_dir), "--best", "--step=4"])
    assert left.value.code == 2


def test_resumed_run_finds_the_same_best(config: Path, run_dir: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "run"
    train(config, resumed, *_WORDS, "train.max_steps=5", "optim.schedule=constant")
    train(config, resumed, *_WORDS, "optim.schedule=constant")
    whole = tmp_path / "whole"
    train(config, whole, *_WORDS, "optim.schedule=constant")
    states = [store.find_all(run)[0].trainer_state()["progress"] for run in (resumed, whole)]
    assert states[0] == states[1] and states[0]["best_step"] is not None
    assert losses(resumed) == losses(whole)


def test_run_that_no_longer_improves_ends_as_done(config: Path, tmp_path: Path) -> None:
    words = ["optim.learning_rate=0", "evaluate.every_steps=1", "train.patience=2"]
    said = train(config, tmp_path / "run", *words)
    assert "done: ended at step 2 of 10, after 2 evaluations" in said
    again = train(config, tmp_path / "run", *words)
    assert "ended at step 2 of 10" in again and "nothing is left to train" in again
    more = train(config, tmp_path / "run", *words[:2], "train.patience=4")
    assert "ended at step 4 of 10" in more
    assert sorted(losses(tmp_path / "run")) == [0, 1, 2, 3, 4]
