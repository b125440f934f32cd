"""Prints what a quickstart run learned and its files. usage: summary.py RUN_DIR AFTER COMMAND"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from neftune_dist.system.records import STEPS, read_records
from neftune_dist.system.text import printable


def main(run_dir: Path, folder: Path, command: str) -> None:
    """Print the comparison of the evaluations in RUN_DIR/evaluations/before and `folder`."""
    folders = (run_dir / "evaluations" / "before", folder)
    before, after = (json.loads((path / "summary.json").read_text()) for path in folders)
    answers = [json.loads((path / "answers.json").read_text()) for path in folders]
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    last = read_records(run_dir / STEPS).rows[-1]
    print()
    print(f"{'':24}{'before':>12}{'after':>12}")
    losses = [summary["losses"]["held_out_loss"] for summary in (before, after)]
    print(f"{'held-out loss':24}{losses[0]:12.4f}{losses[1]:12.4f}")
    right = [summary["answers"]["exact_match"] for summary in (before, after)]
    if right[1] is not None:
        print(f"{'exact match':24}{right[0]:12.1%}{right[1]:12.1%}")
    number = after["losses"]["num_documents"]
    print(f"(noise off, {number} held-out documents, {last['step']} steps)")
    for old, new in _examples(*answers):
        print()
        print(f"  question  {_line(old['instruction'])}")
        print(f"  expected  {_line(old['reference'])}")
        print(f"  before    {_line(old['output'])}")
        print(f"  after     {_line(new['output'])}")
    print()
    print(f"metrics      {run_dir / 'metrics.jsonl'}")
    print(f"TensorBoard  .venv/bin/tensorboard --logdir {run_dir / 'tensorboard'}")
    print(f"model        {run_dir / 'export'}")
    print(f"train longer {command} train.max_steps={2 * last['step']} run_dir={run_dir}")


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
    flat = " / ".join(line for line in printable(text).split("\n") if line.strip())
    return flat if len(flat) <= 110 else flat[:107] + "..."


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
