"""`neftune-dist evaluate` on a run: the figures do not depend on how many ranks share the work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.config import with_checksum
from tests.support import tiny_model

NAMES = ("summary", "items", "answers")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    config = tiny_model.make_config(
        folder,
        train={"max_steps": 4, "micro_batch_tokens": 96},
        checkpoint={"every_steps": 2},
        evaluate={"max_new_tokens": 8, "batch_size": 3, "train_documents": 12},
    )
    tiny_model.train(config, folder / "run")
    return folder / "run"


def results(folder: Path) -> dict[str, Any]:
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in NAMES}


def test_two_ranks_give_the_results_of_one(run_dir: Path, tmp_path: Path) -> None:
    done = tiny_model.run_forked("evaluate", run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = run_dir / "evaluations" / "step_00000004"
    one = results(folder)
    last = json.loads((run_dir / "evaluations.jsonl").read_text().splitlines()[-1])
    assert one["summary"]["subject"] == {"name": "run-step-4", "step": 4, "alpha": 5.0}
    assert one["summary"]["losses"]["held_out_loss"] == pytest.approx(
        last["held_out_loss"], rel=1e-6
    )
    assert f"held-out loss {last['held_out_loss']:.4f}" in done.stdout
    assert len(one["items"]["train_noisy"]) == 12

    two = tiny_model.run_forked("evaluate", run_dir, "--output", tmp_path / "two", ranks=2)
    assert two.returncode == 0, two.stdout + two.stderr
    assert results(tmp_path / "two") == one
    assert "answers: 5 of 5, this rank's share of 8" in two.stdout
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )

    # What one process has begun, two go on with.
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    for name in NAMES:
        (cut / f"{name}.json").unlink()
    rows = [
        {"index": i, **{key: row[key] for key in ("output", "num_tokens", "finished")}}
        for i, row in enumerate(one["answers"])
    ]
    kept = "".join(json.dumps(with_checksum(row)) + "\n" for row in rows[:7])
    (cut / "answers.jsonl").write_text(kept + json.dumps(rows[7])[:9])
    again = tiny_model.run_forked("evaluate", run_dir, "--output", cut, ranks=2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "answers: 7 of 8 kept from an earlier call" in again.stdout
    assert results(cut) == one


def test_earlier_step_other_model_and_damaged_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("evaluations"))
    words = ["evaluate.instructions=null", "evaluate.train_documents=0"]
    for target in ([copy, "--step", 2], [copy / "checkpoints" / "step_00000002"]):
        done = tiny_model.run_forked("evaluate", *target, *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "evaluate: run-step-2," in done.stdout
    early = json.loads((copy / "evaluations/step_00000002/summary.json").read_text())
    assert "losses: kept from an earlier evaluation" in done.stdout

    base = tiny_model.run_forked("evaluate", copy, "--model", run_dir.parent / "model", *words)
    assert base.returncode == 0, base.stdout + base.stderr
    before = json.loads((copy / "evaluations/model/summary.json").read_text())
    first = json.loads((copy / "evaluations.jsonl").read_text().splitlines()[0])
    assert before["subject"] == {"name": "model", "step": None, "alpha": None}
    assert before["losses"]["held_out_loss"] == pytest.approx(first["held_out_loss"], rel=1e-6)
    assert early["losses"]["held_out_loss"] < before["losses"]["held_out_loss"]

    newest = copy / "checkpoints" / "step_00000004"
    shard = newest / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = tiny_model.run_forked("evaluate", copy, *words, ranks=2)
    assert done.returncode == 2
    assert done.stderr == (
        f"neftune-dist: The checkpoint {newest} is damaged: __0_0.distcp is not what was written. "
        "Choose another with --step.\n"
    )
