"""The GPU benchmark: its documents, its going on, and its parts on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks import gpu, gpu_parts


@pytest.mark.parametrize("kind", ["whole", "alpaca", "sharegpt"])
def test_micro_batches_are_full_and_supervised_as_said(kind: str, tmp_path: Path) -> None:
    part = gpu.Part("some", "step", 4, kind)
    _, documents, loader = gpu_parts.prepare_step(part, gpu_parts.Size(), tmp_path)
    steps = [loader.step(step) for step in range(6)]
    batches = [batch for step in steps for batch in step.micro_batches]
    assert all(batch.input_ids.numel() <= 4096 for batch in batches)
    tokens = sum(step.num_tokens for step in steps)
    assert tokens == sum(batch.input_ids.numel() for batch in batches)
    assert tokens / (6 * 4 * 4096) == pytest.approx(1, abs=0.2)
    found = sum(len(batch.targets) for batch in batches)
    assert found / tokens == pytest.approx(gpu_parts.SUPERVISED[kind], abs=0.02)
    # The last tokens of each document are the supervised ones.
    ids, supervised = documents.gather(np.array([3, 1]))
    first = documents.lengths[3]
    assert ids.max() < 32000 and len(ids) == first + documents.lengths[1]
    assert supervised[:first].tolist() == sorted(supervised[:first].tolist())
    assert supervised[:first].sum() == documents.num_supervised[3]


def test_a_part_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def measure(part: gpu.Part, *_: Any) -> dict[str, Any]:
        asked.append(part.name)
        status = "out of memory" if part.name == "2048 none" else "done"
        return {"part": part.name, "what": "loss", "status": status, "error": "too little"}

    def run(*words: str) -> list[str]:
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path), *words])
        gpu.main()
        return list(asked)

    monkeypatch.setattr(gpu, "measure", measure)
    every = [part.name for part in gpu.PARTS]
    assert len(set(every)) == len(every)
    assert run("--only", "noise", "2048 none") == [
        name for name in every if "noise" in name or "2048 none" in name
    ]
    with (tmp_path / "gpu.jsonl").open("a") as file:
        file.write('\n{"part": "loss", "sta')  # killed while it wrote
    others = [name for name in every if "noise" not in name and "2048 none" not in name]
    assert run() == others
    assert run() == []
    assert run("--again") == ["2048 none"]
    assert run("--again", "--seconds", "1") == []


def test_every_kind_of_part_runs(tmp_path: Path) -> None:
    named = {part.name: part for part in gpu.PARTS}
    named["alpaca 4096 selective"] = gpu.step("", 4, *gpu.SELECTIVE, documents="alpaca")
    for name in (
        "4096 full",
        "alpaca 4096 selective",
        "noise",
        "loss",
        "attention alpaca",
        "save",
        "alpaca peer: transformers",
    ):
        # The peer's documents differ in length where they are not all cut at the longest.
        unit = 64 if named[name].what == "peer" else gpu_parts.TINY.unit
        result = gpu_parts.body(named[name], replace(gpu_parts.TINY, unit=unit), None)
        assert result["status"] == "done", result
        if named[name].what == "save":
            assert len(result["standstill_seconds"]) == 3
        elif named[name].what == "peer":
            assert result["tokens_per_second"] > 0 and 0 < result["padding_fraction"] < 1
        elif named[name].what == "step":
            assert result["loss"] == pytest.approx(np.log(gpu_parts.TINY.vocab_size), abs=0.5)
            assert result["tokens_per_second"] > 0
        else:
            figures = [figure for figure in result.values() if isinstance(figure, dict)]
            assert sum("milliseconds" in figure for figure in figures) >= 2
    refused = gpu_parts.body(named["4096 selective liger"], gpu_parts.TINY, None)
    if not torch.cuda.is_available():
        assert refused["status"] == "refused" and "GPU" in refused["error"]
    assert gpu_parts.planned_gib(named["4096 full"], gpu_parts.TINY) > 0
    lines = gpu.table({"x": {"part": "4096 full", "what": "step", **refused}})
    assert any("tokens/s" in line for line in lines)


def test_nothing_that_a_gpu_machine_may_lack_is_needed() -> None:
    code = (
        "import sys\n"
        "for name in ('deepspeed', 'trl', 'torchao', 'liger_kernel', 'gguf'):\n"
        "    sys.modules[name] = None\n"
        "import neftune_dist.training.train, neftune_dist.engine.fsdp2, json\n"
        "print(json.dumps('fine'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == "fine"
