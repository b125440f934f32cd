"""The committed trajectory of a real model on real rows: it begins again as it was recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_model

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "alpaca_smollm2"
DATA = Path(os.environ.get("NEFTUNE_DIST_TEST_DATA", ROOT.parent / "shared")) / "data" / "train"
MODEL = (
    Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    / "neftune_dist"
    / "smollm2-135m-instruct"
)
# Within the warm-up, whose learning rates do not depend on the length of the run.
STEPS = 3


def recorded(engine: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (GOLDEN / f"{engine}.jsonl").read_text().splitlines()]


def test_the_engines_recorded_the_same() -> None:
    one, two = recorded("fsdp2"), recorded("zero3")
    assert len(one) == len(two) == 30
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["noise_norm"] == pytest.approx(5 / 3**0.5, rel=0.01)


@pytest.mark.skipif(
    not (DATA / "alpaca_union.json.gz").exists(),
    reason="needs alpaca_union.json.gz in NEFTUNE_DIST_TEST_DATA",
)
def test_the_run_begins_as_recorded(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "launcher" / "smollm2.py", MODEL], check=True)
    records = tiny_model.train(
        GOLDEN / "config.yaml",
        tmp_path / "run",
        f"model.name_or_path={MODEL}",
        f"data.source={DATA / 'alpaca_union.json.gz'}",
        f"train.max_steps={STEPS}",
        "evaluate.max_documents=1",
        ranks=2,
    )
    for now, then in zip(records, recorded("fsdp2"), strict=False):
        assert now["num_tokens"] == then["num_tokens"]
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-5)
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=1e-4)
