"""The examples for other people's trainers run, add the law's noise, and leave a model behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support.tiny_model import environment, make_model

EXAMPLES = Path(__file__).parents[2] / "configs" / "examples"
LAW = 5.0 / 3**0.5
_TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
LAUNCHERS = {
    "trainer.py": (),
    "sft.py": (),
    "lightning_loop.py": (),
    "accelerate_loop.py": _TORCHRUN,
    "fsdp2_loop.py": _TORCHRUN,
}


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LAUNCHERS)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_example_trains_with_the_laws_noise(name: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    number = 240 if name == "sft.py" else 64  # packed, they are few rows
    texts = [" ".join(map(str, range(i, i + 3 + 5 * i % 40))) for i in range(number)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    done = subprocess.run(
        [sys.executable, *LAUNCHERS[name], str(EXAMPLES / name), model, rows, tmp_path / "out"],
        cwd=tmp_path,
        env=environment(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout
    norms = [float(found) for found in re.findall(r"noise_norm\W+([\d.]+)", done.stdout)]
    assert len(norms) >= 3, done.stdout
    # Documents of three tokens have a norm that varies by 5 %, so the mean of a batch less.
    assert norms == pytest.approx([LAW] * len(norms), rel=0.1), done.stdout
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out")
    )
    assert any(
        (one != other).any()
        for one, other in zip(before.parameters(), after.parameters(), strict=True)
    )
