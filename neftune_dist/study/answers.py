"""Answers of the runs side by side, in Markdown.

A hash of the instruction decides which are shown, so that nobody's taste does.
"""

from __future__ import annotations

import hashlib
import html
import re
from collections.abc import Sequence

from neftune_dist.study.grid import plain
from neftune_dist.study.results import Run, alphas_of

NUM_SHOWN = 5
_CUT = 700  # characters of an answer in the report
_MARKUP = re.compile(r"([\\`*_{}\[\]()#+.!|-])")


def side_by_side(runs: Sequence[Run], number: int = 0) -> str:
    """A table for each instruction with the answers of all alphas: the first answer of the first
    seed whose runs all have answers. Nothing without such a seed.

    Args:
        runs: of the study.
        number: of instructions, those with the least SHA-256, whose answers are cut; 0: all, whole.
    """
    alphas = alphas_of(runs)
    for seed in dict.fromkeys(run.seed for run in runs):
        these = {run.alpha: run.answers for run in runs if run.seed == seed and run.answers}
        if len(these) == len(alphas):
            break
    else:
        return ""
    rows = [[row for row in these[alpha] if not row.get("sample")] for alpha in alphas]
    questions = list(zip(*rows, strict=True))
    questions.sort(key=lambda row: hashlib.sha256(row[0]["instruction"].encode()).digest())
    heads = " | ".join(f"alpha {plain(alpha)}" for alpha in alphas)
    parts = []
    for i, row in enumerate(questions[: number or None]):
        cut = _CUT if number else 0
        said = " | ".join(_cell(answer["output"], cut) for answer in row)
        asked = _cell(row[0]["instruction"], cut)
        rule = " | ".join(":---" for _ in alphas)
        parts.append(f"**{i + 1}.** {asked}\n\n| {heads} |\n| {rule} |\n| {said} |")
    return f"Seed {seed}.\n\n" + "\n\n".join(parts)


def _cell(text: str, cut: int) -> str:
    """Text that shows as it is, within a table's cell."""
    if cut and len(text) > cut:
        text = f"{text[:cut]} ... ({len(text)} characters)"
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    shown = [_MARKUP.sub(r"\\\1", html.escape(line, quote=False)) for line in lines]
    # GitHub makes links of bare addresses, and strikes out between tildes.
    shown = [line.replace("://", "&#58;//").replace("~", "&#126;") for line in shown]
    return "<br>".join(shown) or "(empty)"
