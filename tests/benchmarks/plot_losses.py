"""Training losses of runs, and how far apart they are, as a picture.

usage: python tests/benchmarks/plot_losses.py OUTPUT.png NAME=METRICS.jsonl NAME=METRICS.jsonl
Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib import pyplot


def main(output: str, runs: list[str]) -> None:
    losses = {}
    for run in runs:
        name, _, path = run.partition("=")
        lines = Path(path).read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines]
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 4.2), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    (first, reference), *others = losses.items()
    steps = range(1, len(reference) + 1)
    above.plot(steps, reference, label=first, linewidth=4, alpha=0.35)
    for name, values in others:
        above.plot(steps, values, label=name, linewidth=1.2)
        gaps = [abs(a / b - 1) for a, b in zip(values, reference, strict=True)]
        below.plot(steps, gaps, marker=".", label=name)
    above.set_ylabel("training loss")
    above.legend(frameon=False)
    below.set_ylabel("relative gap")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(output, dpi=130)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
