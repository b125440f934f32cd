"""The report: Markdown with plots beside it, and the same as one HTML file.

Parts without measurements have no section; the section "Not measured" names them.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

import markdown

from neftune_dist.evaluation.results import LABELS
from neftune_dist.evaluation.win_rate import win_rate
from neftune_dist.study.answers import NUM_SHOWN, side_by_side
from neftune_dist.study.compare import FEWEST_SEEDS, Difference
from neftune_dist.study.conclusion import conclusion
from neftune_dist.study.grid import plain
from neftune_dist.study.measures import Judged, differences, measure, untested
from neftune_dist.study.plots import plots
from neftune_dist.study.provenance import provenance, shown_name
from neftune_dist.study.results import Run, alphas_of, seeds_of
from neftune_dist.system import storage

_FOLDER = Path(__file__).parent
_METHOD, _PAGE = (
    Template((_FOLDER / name).read_text(encoding="utf-8")) for name in ("method.md", "page.html")
)
# Patterns of Markdown that become HTML which does more than show text.
_ACTIVE_PATTERNS = (
    *("html", "link", "reference", "short_reference", "image_link", "image_reference"),
    *("short_image_ref", "autolink", "automail"),
)

_ANSWERS_TITLE = "Answers side by side"  # the page's style names it
_RATES = {  # figures of `win_rate`, as a table names them
    "win_rate": "win rate",
    "length_controlled": "at equal lengths",
    "length_matched": "over pairs of like lengths",
    "num_length_matched": "such pairs",
    "num_wins": "wins",
    "num_losses": "losses",
    "num_ties": "ties",
    "num_unparsed": "not parsed",
    "num_failed": "request failed",
    "order_agreement": "same in both orders",
}
Figure = Callable[[Run], float | None]  # of a run; None where it was not measured


def write(
    folder: Path, runs: Sequence[Run], judged: Judged, notes: Sequence[str], power: str = ""
) -> str:
    """Write plots/*.svg, report and answers (.md and .html) into `folder`; return the report's
    Markdown.

    Args:
        folder: of the study.
        runs: all of them.
        judged: judgements of answers against those of the least alpha.
        notes: why something is missing, for the reader.
        power: what the design could see, as it was said before the runs.

    Raises:
        UserError: the folder cannot be written.
    """
    found = differences(runs, judged)
    pictures = plots(runs, found)
    text = _markdown(runs, judged, found, list(pictures), [*notes, *untested(runs, found)], power)
    pages = {"report": text}
    if answers := side_by_side(runs):
        pages["answers"] = f"# {_ANSWERS_TITLE}\n\n{answers}\n"
    with storage.writing(str(folder)):
        (folder / "plots").mkdir(exist_ok=True)
        for name, svg in pictures.items():
            storage.write(folder / "plots" / f"{name}.svg", svg)
        for name, content in pages.items():
            storage.write(folder / f"{name}.md", content)
            storage.write(folder / f"{name}.html", _html(content, pictures))
    return text


def claim(folder: Path) -> None:
    """Mark `folder` as a study's. Raises `UserError` where it holds another's report, or cannot be
    written."""
    names = ("report.md", "report.html", "answers.md", "answers.html", "plots", "judgements")
    storage.claim(folder, names, "neftune_study.json", f"run_dir={folder}")


def _markdown(
    runs: Sequence[Run],
    judged: Judged,
    found: Sequence[Difference],
    pictures: Sequence[str],
    notes: Sequence[str],
    power: str,
) -> str:
    def pictured(*names: str) -> str:
        made = [name for name in names if name in pictures]
        return "".join(f"\n\n![{n.replace('_', ' ')}](plots/{n}.svg)" for n in made)

    alphas, seeds = alphas_of(runs), seeds_of(runs)
    measures = list(dict.fromkeys(d.measure for d in found))
    by_measure = sorted(found, key=lambda d: measures.index(d.measure))
    against_base = _win_rates({key: win_rate(of) for key, of in judged.items()})
    if against_base:
        base = f"Against the answers of alpha {plain(alphas[0])} at the same seed."
        against_base = f"{base}\n\n{against_base}"
    # Where `judge.reference` names answers, `evaluate` has compared those of each run with them.
    against_reference = {(r.alpha, r.seed): f for r in runs if (f := r.figures("judge"))}
    forest = pictured("forest")
    if forest:
        forest += "\n\nFilled: significant after Holm's correction. Base: the least alpha."
    sections = {
        "Conclusion": conclusion(found, len(seeds)),
        "Not measured": "\n".join(f"- {note}" for note in notes),
        "Paired differences": f"{forest}\n\n{_differences(by_measure, alphas[0])}",
        "Noise of the answers": _noises(by_measure),
        "Power": power and f'Before the runs: {power}. After them: "visible from" above.',
        "By seed": _by_seed(by_measure, seeds),
        "Losses": _losses(runs) + pictured("training_loss", "held_out_loss", "losses"),
        "Answers": _means(runs, "answers") + pictured("answers"),
        "Abilities": _means(runs, "tasks") + pictured("tasks"),
        "Judged": against_base,
        "Judged against the reference": _win_rates(against_reference),
        _ANSWERS_TITLE: _shown_answers(runs),
        "Provenance": "\n".join(f"- {name}: {text}" for name, text in provenance(runs).items()),
        "Method": _METHOD.substitute(fewest_seeds=FEWEST_SEEDS),
    }
    parts = [f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text.strip()]
    summary = (
        f"{len(runs)} runs of {len(runs[0].steps)} steps: "
        f"`{shown_name(runs[0].config.model.name_or_path)}`; "
        f"alpha {', '.join(map(plain, alphas))}; seeds {', '.join(map(str, seeds))}."
    )
    return "\n\n".join(["# Study of noise.alpha", summary, *parts]) + "\n"


def _differences(found: Sequence[Difference], base: float) -> str:
    heads = ["measure", "alpha", f"at alpha {plain(base)}", "at alpha", "difference"]
    heads += ["95 % interval", "visible from", "over", "items", "p", "p (Holm)"]
    rows = []
    for d in found:
        kind = measure(d.measure)
        rows.append(
            [
                f"{kind.label} ({kind.unit.strip()})" if kind.unit else kind.label,
                plain(d.alpha),
                *(kind.shown(d.base), kind.shown(d.value), kind.shown(d.mean, True)),
                kind.shown_range(d.low, d.high) if d.over else f"not tested: {d.why_untested}",
                "" if math.isnan(d.visible) else kind.shown(d.visible),
                d.over,
                str(d.num_items or ""),
                *map(_p_value, (d.p, d.p_holm)),
            ]
        )
    return _table(heads, rows)


def _noises(found: Sequence[Difference]) -> str:
    """Standard errors of differences by source, of measures with several answers to an item."""
    rows = []
    for d in found:
        kind = measure(d.measure)
        if not math.isnan(d.prediction_error + d.item_error):
            errors = kind.shown(d.prediction_error), kind.shown(d.item_error)
            rows.append([kind.label, plain(d.alpha), *errors])
    table = _table(["measure", "alpha", "prediction noise", "item noise"], rows)
    return f"Standard errors of the differences.\n\n{table}" if table else ""


def _shown_answers(runs: Sequence[Run]) -> str:
    shown = side_by_side(runs, NUM_SHOWN)
    why = f"The {NUM_SHOWN} instructions whose SHA-256 is least. [All of them](answers.md), whole."
    return f"{why} {shown}" if shown else ""


def _by_seed(found: Sequence[Difference], seeds: Sequence[int]) -> str:
    rows = []
    for d in found:
        kind = measure(d.measure)
        rows.append([kind.label, plain(d.alpha), *(kind.shown(v, True) for v in d.by_seed)])
    return _table(["difference in", "alpha", *(f"seed {seed}" for seed in seeds)], rows)


def _losses(runs: Sequence[Run]) -> str:
    figures: dict[str, Figure] = {
        "held-out loss before training": lambda run: run.first,
        "held-out loss after": lambda run: run.last,
        "training loss, last tenth of steps, noise on": lambda run: run.training,
        "noise norm": lambda run: run.mean("noise_norm"),
        "noise norm by the law": lambda run: run.mean("noise_law"),
    }
    table = _by_alpha(runs, figures, ".4f")
    return f"Means over the seeds.\n\n{table}\n\n{_means(runs, 'losses')}"


def _means(runs: Sequence[Run], part: str) -> str:
    """Means over the seeds of the numbers in a part of the evaluations' summaries."""
    figures: dict[str, Figure] = {}
    for key in dict.fromkeys(key for run in runs for key in run.figures(part)):
        label = f"accuracy on {key}" if part == "tasks" else LABELS.get(key, key)
        figures[label] = lambda run, key=key: run.figures(part).get(key)  # type: ignore[misc]
    return f"After training; means over the seeds.\n\n{_by_alpha(runs, figures)}" if figures else ""


def _by_alpha(runs: Sequence[Run], figures: Mapping[str, Figure], form: str = ".5g") -> str:
    """A table of means over the seeds: a row a figure, a column an alpha."""
    alphas = alphas_of(runs)
    rows = [
        [name, *(_mean([of(run) for run in runs if run.alpha == alpha], form) for alpha in alphas)]
        for name, of in figures.items()
    ]
    return _table(["", *(f"alpha {plain(alpha)}" for alpha in alphas)], rows)


def _win_rates(rates: Mapping[tuple[float, int], Mapping[str, Any]]) -> str:
    """A table of the figures of `win_rate` by alpha and seed."""
    rows = [
        [plain(alpha), str(seed), *(_rate(figures.get(key)) for key in _RATES)]
        for (alpha, seed), figures in rates.items()
    ]
    return _table(["alpha", "seed", *_RATES.values()], rows)


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.1f} %"


def _p_value(p: float) -> str:
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _mean(values: Sequence[float | None], form: str) -> str:
    """The mean of those there are; empty without any."""
    known = [value for value in values if value is not None]
    mean = fmean(known) if known else math.nan
    if math.isnan(mean):
        return ""
    return f"{mean:.0f}" if mean.is_integer() and abs(mean) > 1 else f"{mean:{form}}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its first column left-aligned; nothing without rows."""
    lines = [heads, [":---", *["---:"] * (len(heads) - 1)], *rows] if rows else []
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _html(text: str, pictures: dict[str, bytes]) -> str:
    """One file: pictures within it, nothing to be loaded, no script. HTML and links in a name or an
    answer are shown as they are written."""
    converter = markdown.Markdown(
        extensions=["tables", "sane_lists", "toc"], extension_configs={"toc": {"marker": ""}}
    )
    converter.preprocessors.deregister("html_block")
    for pattern in _ACTIVE_PATTERNS:
        converter.inlinePatterns.deregister(pattern)
    body: str = converter.convert(text)

    def inline(match: re.Match[str]) -> str:
        if match[2] not in pictures:
            return match[0]
        svg = base64.b64encode(pictures[match[2]]).decode()
        return f'<img alt="{match[1]}" src="data:image/svg+xml;base64,{svg}" />'

    body = re.sub(r"!\[([\w ]+)\]\(plots/(\w+)\.svg\)", inline, body)
    # Of links and tags, those that this module writes.
    body = body.replace("[All of them](answers.md)", '<a href="answers.html">All of them</a>')
    body = body.replace("&lt;br&gt;", "<br>")
    return _PAGE.substitute(body=body)
