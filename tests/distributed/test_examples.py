"""The examples for other people's trainers run, add the law's noise, and leave a model behind."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support import tiny_model

EXAMPLES = Path(__file__).parents[2] / "configs" / "examples"
LAW = 5.0 / 3**0.5
RANKS = {
    "trainer.py": 1,
    "sft.py": 1,
    "lightning_loop.py": 1,
    "accelerate_loop.py": 2,
    "fsdp2_loop.py": 2,
}


@dataclass(frozen=True)
class Script:
    """An example, run as Python runs it."""

    path: Path
    words: tuple[str, ...]

    def __call__(self) -> None:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        os.chdir(Path(self.words[-1]).parent)
        sys.argv = [str(self.path), *self.words]
        runpy.run_path(str(self.path), run_name="__main__")


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(RANKS)


@pytest.mark.parametrize("name", RANKS)
def test_example_trains_with_the_laws_noise(name: str, tmp_path: Path) -> None:
    model = tiny_model.make_model(tmp_path / "model")
    number = 240 if name == "sft.py" else 64  # packed, they are few rows
    texts = [" ".join(map(str, range(i, i + 3 + 5 * i % 40))) for i in range(number)]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = (str(model), str(rows), str(tmp_path / "out"))
    done = tiny_model.call_forked(Script(EXAMPLES / name, words), ranks=RANKS[name])
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    norms = [float(found) for found in re.findall(r"noise_norm\W+([\d.]+)", printed)]
    assert len(norms) >= 3, printed
    # Documents of three tokens have a norm that varies by 5 %, so the mean of a batch less.
    assert norms == pytest.approx([LAW] * len(norms), rel=0.1), printed
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out")
    )
    assert any(
        (one != other).any()
        for one, other in zip(before.parameters(), after.parameters(), strict=True)
    )
