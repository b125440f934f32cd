"""Committed trajectories: runs of today's code are the recorded ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import golden_model, tiny_model
from tests.support.shared_data import shared

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
ENGINES = {
    "fsdp2": ("engine.name=fsdp2",),
    "zero3": ("engine.name=deepspeed", "engine.zero_stage=3"),
}
SMOLLM2 = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    / "neftune_dist"
    / "smollm2-135m-instruct"
)


def recorded(run: str, engine: str) -> list[dict[str, float]]:
    path = GOLDEN / run / f"{engine}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_recorded(records: list[dict[str, Any]], expected: list[dict[str, float]]) -> None:
    for now, then in zip(records, expected, strict=True):
        for key in ("num_documents", "num_tokens", "num_supervised_tokens", "padding_fraction"):
            assert now[key] == then[key]
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-5)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-4)
        assert now["noise_norm"] == pytest.approx(then["noise_norm"], rel=1e-5)


@pytest.mark.parametrize("run", ["tiny_builtin", "alpaca_smollm2"])
def test_the_engines_recorded_the_same(run: str) -> None:
    one, two = recorded(run, "fsdp2"), recorded(run, "zero3")
    assert len(one) == len(two) == 30
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["noise_norm"] == pytest.approx(5 / 3**0.5, rel=0.01)


@pytest.mark.parametrize("engine", ENGINES)
def test_tiny_run_is_the_recorded_one(engine: str, tmp_path: Path) -> None:
    records = tiny_model.train(
        GOLDEN / "tiny_builtin" / "config.yaml",
        tmp_path / "run",
        f"model.name_or_path={golden_model.make(tmp_path / 'model')}",
        f"data.cache_dir={tmp_path / 'cache'}",
        *ENGINES[engine],
        ranks=2,
    )
    assert_recorded(records, recorded("tiny_builtin", engine))


def test_run_of_a_real_model_on_real_rows_begins_as_recorded(tmp_path: Path) -> None:
    rows = shared("data/train/alpaca_union.json.gz")
    subprocess.run([sys.executable, ROOT / "launcher" / "smollm2.py", SMOLLM2], check=True)
    num_steps = 2  # within the warm-up, whose learning rates do not depend on the run's length
    records = tiny_model.train(
        GOLDEN / "alpaca_smollm2" / "config.yaml",
        tmp_path / "run",
        f"model.name_or_path={SMOLLM2}",
        f"data.source={rows}",
        f"train.max_steps={num_steps}",
        "evaluate.max_documents=1",
        ranks=2,
    )
    assert_recorded(records, recorded("alpaca_smollm2", "fsdp2")[:num_steps])
