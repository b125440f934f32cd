"""A sample of the damage drill: no traceback, no hang, no silent change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from neftune_dist import cli
from neftune_dist.checkpoint import choice, flat, store
from neftune_dist.checkpoint.merged import ModelTensors
from tests.support import tiny_model


def test_damage_is_named_and_harms_no_more() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.distributed.damage", "--sample", "12"],
        env=tiny_model.environment(),
        capture_output=True,
        text=True,
        timeout=tiny_model.DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 cases" in done.stdout or "13 cases" in done.stdout


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    words = ["train.max_steps=2", "checkpoint.every_steps=1", "evaluate.instructions=null"]
    tiny_model.train(tiny_model.make_config(folder), folder / "run", *words)
    return folder / "run"


@pytest.mark.parametrize("verb", ["evaluate", "export"])
@pytest.mark.parametrize("moment", ["trainer_state", "first_flaw", "identity", "content", "shards"])
def test_checkpoint_pruned_while_it_is_read_is_one_sentence(
    verb: str,
    moment: str,
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By a run that goes on: one sentence, whenever it happens."""
    own = tmp_path / "run"
    shutil.copytree(run_dir, own)
    owners: dict[str, Any] = {"content": ModelTensors, "shards": flat.Reader}
    owner = owners.get(moment, store.Checkpoint)
    name = {"identity": "files", "content": "of", "shards": "read"}.get(moment, moment)
    work = getattr(owner, name)

    def pruned(*arguments: Any, **options: Any) -> Any:
        shutil.rmtree(own / "checkpoints/step_00000002", ignore_errors=True)
        return work(*arguments, **options)

    real = choice.choose

    def choose(*arguments: Any) -> store.Checkpoint:
        chosen = real(*arguments)  # it was there when it was chosen
        monkeypatch.setattr(owner, name, staticmethod(pruned) if moment == "content" else pruned)
        return chosen

    monkeypatch.setattr(choice, "choose", choose)
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, str(own)])
    said = capfd.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert any("removed" in line and "step_00000002" in line for line in said), said
