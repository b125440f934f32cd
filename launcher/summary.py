"""What a quickstart run learned, and where everything lies. usage: summary.py RUN_DIR COMMAND"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(run_dir: Path, command: str) -> None:
    """Print the comparison of evaluation_before.json and evaluation_after.json."""
    before = json.loads((run_dir / "evaluation_before.json").read_text())
    after = json.loads((run_dir / "evaluation_after.json").read_text())
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    steps = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = steps[-1]
    print()
    print(f"{'':24}{'before':>12}{'after':>12}")
    print(f"{'held-out loss':24}{before['held_out_loss']:12.4f}{after['held_out_loss']:12.4f}")
    if after["exact_match"] is not None:
        print(f"{'exact match':24}{before['exact_match']:12.1%}{after['exact_match']:12.1%}")
    print(f"(noise off, {after['num_documents']} held-out documents, {last['step']} steps)")
    for old, new in _examples(before["answers"], after["answers"]):
        print()
        print(f"  question  {_line(old['prompt'])}")
        print(f"  expected  {_line(old['expected'])}")
        print(f"  before    {_line(old['answer'])}")
        print(f"  after     {_line(new['answer'])}")
    print()
    print(f"metrics      {run_dir / 'metrics.jsonl'}")
    print(f"TensorBoard  .venv/bin/tensorboard --logdir {run_dir / 'tensorboard'}")
    print(f"model        {run_dir / 'export'}")
    print(f"train on     {command} train.max_steps={2 * last['step']} run_dir={run_dir}")


def _examples(
    before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Two questions: the first that is answered rightly now and was not, and the first that is
    not, where there are such; else the first two."""
    pairs = list(zip(before, after, strict=True))
    gained = [p for p in pairs if p[1]["correct"] and not p[0]["correct"]]
    wrong = [p for p in pairs if not p[1]["correct"]]
    chosen = gained[:1] + wrong[:1]
    return chosen if len(chosen) == 2 else pairs[:2]


def _line(text: str) -> str:
    flat = " / ".join(line for line in text.split("\n") if line.strip())
    return flat if len(flat) <= 110 else flat[:107] + "..."


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
