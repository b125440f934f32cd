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

_METHOD = f"""\
Runs of one seed start from the same weights and train on the same documents in the same steps; they
differ in alpha alone. A difference compares two runs of one seed on the same item: a held-out
document (weighted by its supervised tokens), an instruction or a task item. Differences are
averaged over seeds.

The 95 % interval covers two sources of error, the choice of seeds and the choice of items. Over n
seeds the variance of the mean is s^2 / n; over items it is that of the linearised weighted mean.
The two are added, which makes the interval slightly too wide. It is Student's, with n - 1 or
Satterthwaite's degrees of freedom. It holds for other seeds and other items of the same kind, not
for other data, models, learning rates or lengths of training. With fewer than {FEWEST_SEEDS} seeds
it covers items alone, and describes the trained models, not the effect of alpha.

`p` is the p-value of no difference; `p (Holm)` is corrected for all comparisons of this report. A
win rate is compared with one half. Win rates at equal lengths come from a logistic regression on
the difference in characters, in the manner of AlpacaEval 2; those over pairs of like lengths leave
out pairs whose lengths differ by more than a tenth of the longer one.

"Visible from" is the smallest true difference that 4 of 5 such studies would see: (t at 97.5 % + t
at 80 %) standard errors (Bloom, Evaluation Review 1995), for one comparison alone.

Where an instruction has several answers, its figure is their mean. Prediction noise is the standard
error of a difference that comes from which answers were drawn, item noise the one from which
instructions were asked (Wang, arXiv 2512.21326); more answers to each reduce the first alone."""

# Patterns of Markdown that become HTML which does more than show text.
_ACTIVE_PATTERNS = (
    *("html", "link", "reference", "short_reference", "image_link", "image_reference"),
    *("short_image_ref", "autolink", "automail"),
)

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #8884; vertical-align: top; }
th + th, td + td { white-space: nowrap; }
td:first-child { min-width: 10rem; }
#answers ~ table td { min-width: 12rem; white-space: normal; }
p { overflow-x: auto; }
img { max-width: 100%; min-width: 27rem; }"""
_ANSWERS_TITLE = "Answers side by side"
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
    sections = {
        "Conclusion": conclusion(found, len(seeds)),
        "Not measured": "\n".join(f"- {note}" for note in notes),
        "Paired differences": _forest(pictured("forest")) + _differences(by_measure, alphas[0]),
        "Noise of the answers": _noises(by_measure),
        "Power": _power(power, found),
        "By seed": _by_seed(by_measure, seeds),
        "Losses": _losses(runs) + pictured("training_loss", "held_out_loss", "losses"),
        "Answers": _means(runs, "answers") + pictured("answers"),
        "Abilities": _means(runs, "tasks") + pictured("tasks"),
        "Judged": against_base,
        "Judged against the reference": _win_rates(against_reference),
        _ANSWERS_TITLE: _shown_answers(runs),
        "Provenance": "\n".join(f"- {name}: {text}" for name, text in provenance(runs).items()),
        "Method": _METHOD,
    }
    parts = [f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text.strip()]
    summary = (
        f"{len(runs)} runs of {len(runs[0].steps)} steps: "
        f"`{shown_name(runs[0].config.model.name_or_path)}`; "
        f"alpha {', '.join(map(plain, alphas))}; seeds {', '.join(map(str, seeds))}."
    )
    return "\n\n".join(["# Study of noise.alpha", summary, *parts]) + "\n"


def _forest(picture: str) -> str:
    caption = "Filled: significant after Holm's correction. Base: the least alpha."
    return f"{picture}\n\n{caption}\n\n" if picture else ""


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


def _power(power: str, found: Sequence[Difference]) -> str:
    """What the design could see, as said before the runs and as measured after them."""
    visible = [d for d in found if not math.isnan(d.visible)]
    widest = {d.measure: 0.0 for d in visible}
    for d in visible:
        widest[d.measure] = max(widest[d.measure], d.visible)
    measured = "; ".join(
        f"{measure(name).label} {measure(name).shown(v)}{measure(name).unit}"
        for name, v in widest.items()
    )
    before = f"Before the runs: {power}." if power else ""
    after = f"After them, at the alpha with the widest interval: {measured}." if measured else ""
    return f"{before}\n\n{after}".strip()


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
    percents = {"win_rate": "win rate", "length_controlled": "at equal lengths"}
    percents |= {"length_matched": "over pairs of like lengths"}
    counts = {"num_length_matched": "such pairs", "num_wins": "wins", "num_losses": "losses"}
    counts |= {"num_ties": "ties", "num_unparsed": "not parsed", "num_failed": "request failed"}
    rows = [
        [
            *(plain(alpha), str(seed)),
            *(_percent(rate.get(key), digits=1) for key in percents),
            *(str(rate.get(key, "")) for key in counts),
            _percent(rate.get("order_agreement"), digits=0),
        ]
        for (alpha, seed), rate in rates.items()
    ]
    heads = ["alpha", "seed", *percents.values(), *counts.values(), "same in both orders"]
    return _table(heads, rows)


def _p_value(p: float) -> str:
    return "" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f} %"


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
    converter = markdown.Markdown(extensions=["tables", "sane_lists"])
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
    body = body.replace(f"<h2>{_ANSWERS_TITLE}", f'<h2 id="answers">{_ANSWERS_TITLE}')
    body = body.replace(f"<h1>{_ANSWERS_TITLE}", f'<h1 id="answers">{_ANSWERS_TITLE}')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Study of noise.alpha</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
