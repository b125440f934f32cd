"""The report's plots: one deterministic SVG file each, legible on white and on black.

A plot without data is left out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from neftune_dist.evaluation.results import LABELS
from neftune_dist.study.compare import Difference
from neftune_dist.study.grid import plain
from neftune_dist.study.measures import measure
from neftune_dist.study.results import Run, alphas_of, seeds_of

_GREY = "#808080"  # of text and axes, on a transparent ground
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")  # Paul Tol's bright
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "neftune_dist",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _GREY,
    "axes.edgecolor": _GREY,
    "axes.labelcolor": _GREY,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
    "legend.frameon": False,
}
_COLUMNS = 2  # of panels: legible on a narrow screen, too
_SMOOTHED_SHARE = 50  # of the steps: a mean over each fiftieth of them
# Figures of an evaluation that are drawn; those of tasks all are.
_DRAWN = (
    *("train_loss", "train_loss_noisy", "held_out_loss"),
    *("characters", "tokens", "repetition_2_percent", "log_diversity", "self_bleu"),
    *("rouge_l", "bleu", "cut", "exact_match"),
)


def plots(runs: Sequence[Run], differences: Sequence[Difference]) -> dict[str, bytes]:
    """Draw the SVG plots that there is data for: training_loss, held_out_loss, losses, answers,
    tasks, forest."""
    made: dict[str, bytes] = {}
    with matplotlib.rc_context(_STYLE):
        for name, figure in (
            ("training_loss", _curves(runs, _training_curve, "loss, noise on")),
            ("held_out_loss", _curves(runs, _held_out_curve, "held-out loss, noise off")),
            *((part, _panels(runs, part)) for part in ("losses", "answers", "tasks")),
            ("forest", _forest(differences)),
        ):
            if figure is not None:
                file = io.BytesIO()
                figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
                made[name] = file.getvalue()
    return made


Curve = tuple[np.ndarray, np.ndarray]  # steps, values


def _training_curve(run: Run) -> Curve:
    """Means over stretches of steps; a skipped step may have no loss."""
    steps = [(s["step"], s["loss"]) for s in run.steps if s["loss"] is not None]
    parts = np.array_split(np.array(steps, dtype=float), min(_SMOOTHED_SHARE, len(steps)))
    means = np.array([part.mean(axis=0) for part in parts])
    return means[:, 0], means[:, 1]


def _held_out_curve(run: Run) -> Curve:
    steps, losses = np.array(run.held_out).T
    return steps, losses


def _curves(runs: Sequence[Run], of: Callable[[Run], Curve], label: str) -> Figure:
    """A line a run, thin, and the mean over the seeds of each alpha, thick."""
    figure = Figure(figsize=(6.0, 3.4), layout="tight")
    axes: Any = figure.add_subplot()
    for alpha in alphas_of(runs):
        curves = [of(run) for run in runs if run.alpha == alpha]
        colour = _colour(runs, alpha)
        for steps, values in curves if len(curves) > 1 else []:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.5)
        if all(np.array_equal(steps, curves[0][0]) for steps, _ in curves):
            mean = np.mean([values for _, values in curves], axis=0)
            axes.plot(
                curves[0][0], mean, color=colour, linewidth=1.8, label=f"alpha {plain(alpha)}"
            )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.legend()
    return figure


def _panels(runs: Sequence[Run], part: str) -> Figure | None:
    """A panel for each figure that any run has: a dot a run, a bar for the mean over the seeds."""
    found = {key: None for run in runs for key in run.figures(part)}
    keys = list(found) if part == "tasks" else [key for key in _DRAWN if key in found]
    if not keys:
        return None
    alphas, seeds = alphas_of(runs), seeds_of(runs)
    rows = -(-len(keys) // _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 2.0 * rows), layout="tight")
    for number, key in enumerate(keys, 1):
        title = LABELS.get(key, f"accuracy on {key}")
        axes: Any = figure.add_subplot(rows, _COLUMNS, number, title=title)
        for i, alpha in enumerate(alphas):
            these = [run for run in runs if run.alpha == alpha and key in run.figures(part)]
            values = [run.figures(part)[key] for run in these]
            colour = _colour(runs, alpha)
            places = [seeds.index(run.seed) - (len(seeds) - 1) / 2 for run in these]
            at = [i + 0.3 * place / len(seeds) for place in places]
            axes.plot(at, values, "o", color=colour, markersize=4)
            if values:
                axes.hlines(fmean(values), i - 0.3, i + 0.3, color=colour, linewidth=1.8)
        axes.set_xticks(range(len(alphas)), list(map(plain, alphas)))
        axes.set_xlim(-0.6, len(alphas) - 0.4)
        axes.set_xlabel("alpha")
        axes.margins(y=0.12)
        axes.ticklabel_format(axis="y", useOffset=False)
    return figure


def _forest(differences: Sequence[Difference]) -> Figure | None:
    """All differences in units of their standard error, with their 95 % intervals, a row for each
    measure and alpha; filled where significant after Holm's correction."""
    drawn = [d for d in differences if d.error > 0]
    if not drawn:
        return None
    names = list(dict.fromkeys(d.measure for d in drawn))
    alphas = list(dict.fromkeys(d.alpha for d in drawn))
    step = 0.7 / len(alphas)
    figure = Figure(figsize=(6.4, 1.2 + len(names) * (0.16 + 0.13 * len(alphas))), layout="tight")
    axes: Any = figure.add_subplot()
    for i, alpha in enumerate(alphas):
        colour = _COLOURS[(i + 1) % len(_COLOURS)]
        for d in (d for d in drawn if d.alpha == alpha):
            y = names.index(d.measure) + (i - (len(alphas) - 1) / 2) * step
            axes.hlines(y, d.low / d.error, d.high / d.error, color=colour, linewidth=1.4)
            face = colour if d.is_significant else "none"
            axes.plot(d.mean / d.error, y, "o", color=colour, markerfacecolor=face, markersize=4.5)
        axes.plot([], [], "o-", color=colour, markersize=4.5, label=f"alpha {plain(alpha)}")
    axes.axvline(0.0, color=_GREY, linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), [measure(name).label for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("difference in standard errors, with its 95 % interval")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(alphas))
    return figure


def _colour(runs: Sequence[Run], alpha: float) -> str:
    return _COLOURS[alphas_of(runs).index(alpha) % len(_COLOURS)]
