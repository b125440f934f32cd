"""The report: Markdown with plots beside it, and the same as one HTML file.

Parts without measurements have no section; the section "Not measured" names them.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import markdown

from neftune_dist.evaluation.text_statistics import LABELS
from neftune_dist.evaluation.win_rate import win_rate
from neftune_dist.study.compare import FEWEST_SEEDS, Difference
from neftune_dist.study.conclusion import conclusion
from neftune_dist.study.grid import plain
from neftune_dist.study.measures import Judged, differences, measure
from neftune_dist.study.plots import plots
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
the difference in characters, in the manner of AlpacaEval 2."""

_LABELS = {
    **LABELS,
    "held_out_loss": "held-out loss",
    "num_documents": "held-out documents",
    "num_supervised_tokens": "their supervised tokens",
    "num_train_documents": "training documents",
    "train_loss": "training loss, noise off",
    "train_loss_noisy": "training loss, noise on",
}

# What in Markdown becomes HTML that does more than show text.
_ACTIVE_PATTERNS = (
    "html",
    "link",
    "reference",
    "short_reference",
    "image_link",
    "image_reference",
    "short_image_ref",
    "autolink",
    "automail",
)

_STYLE = """\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-size: 14px; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #8884; }
img { max-width: 100%; }"""


def write(folder: Path, runs: Sequence[Run], judged: Judged, notes: Sequence[str]) -> str:
    """Write plots/*.svg, report.md and report.html into `folder`; the Markdown.

    Args:
        notes: why something is missing, for the reader.

    Raises:
        UserError: the folder cannot be written.
    """
    found = differences(runs, judged)
    pictures = plots(runs, found)
    text = _markdown(runs, judged, found, list(pictures), notes)
    with storage.writing(str(folder)):
        (folder / "plots").mkdir(exist_ok=True)
        for name, svg in pictures.items():
            storage.write(folder / "plots" / f"{name}.svg", svg)
        for name, content in (("report.md", text), ("report.html", _html(text, pictures))):
            storage.write(folder / name, content)
    return text


def claim(folder: Path) -> None:
    """Mark `folder` as a study's. Raises `UserError` where it holds another's report, or cannot be
    written."""
    names = ("report.md", "report.html", "plots", "judgements")
    storage.claim(folder, names, "neftune_study.json", f"run_dir={folder}")


def _markdown(
    runs: Sequence[Run],
    judged: Judged,
    found: Sequence[Difference],
    pictures: Sequence[str],
    notes: Sequence[str],
) -> str:
    def pictured(*names: str) -> str:
        made = [name for name in names if name in pictures]
        return "".join(f"\n\n![{n.replace('_', ' ')}](plots/{n}.svg)" for n in made)

    alphas, seeds = alphas_of(runs), seeds_of(runs)
    measures = list(dict.fromkeys(d.measure for d in found))
    by_measure = sorted(found, key=lambda d: measures.index(d.measure))
    sections = {
        "Conclusion": conclusion(found, len(seeds)),
        "Not measured": "\n".join(f"- {note}" for note in notes),
        "Paired differences": _differences(by_measure, alphas[0]) + pictured("differences"),
        "By seed": _by_seed(by_measure, seeds),
        "Losses": _losses(runs) + pictured("training_loss", "held_out_loss", "losses"),
        "Answers": _means(runs, "answers") + pictured("answers"),
        "Abilities": _means(runs, "tasks") + pictured("tasks"),
        "Judged": _judged(judged, alphas[0]) + pictured("win_rates"),
        "Judged against the reference": _against_reference(runs),
        "Method": _METHOD,
    }
    parts = [f"## {title}\n\n{text.strip()}" for title, text in sections.items() if text]
    summary = (
        f"{len(runs)} runs of {len(runs[0].steps)} steps: `{runs[0].config.model.name_or_path}`; "
        f"alpha {', '.join(map(plain, alphas))}; seeds {', '.join(map(str, seeds))}."
    )
    return "\n\n".join(["# Study of noise.alpha", summary, *parts]) + "\n"


def _differences(found: Sequence[Difference], base: float) -> str:
    if not found:
        return ""
    heads = ["measure", "alpha", f"at alpha {plain(base)}", "at alpha", "difference"]
    heads += ["95 % interval", "over", "items", "p", "p (Holm)"]
    rows = []
    for d in found:
        kind = measure(d.measure)
        shown = [kind.shown(d.base), kind.shown(d.value), kind.shown(d.mean, True)]
        bounds = "too few seeds"
        if d.low is not None and d.high is not None:
            bounds = f"{kind.shown(d.low, True)} to {kind.shown(d.high, True)}"
        tests = ["" if p is None else _tested(p) for p in (d.p, d.p_holm)]
        items = str(d.num_items or "")
        name = f"{kind.label}{f' ({kind.unit.strip()})' if kind.unit else ''}"
        rows.append([name, plain(d.alpha), *shown, bounds, d.over, items, *tests])
    return _table(heads, rows)


def _by_seed(found: Sequence[Difference], seeds: Sequence[int]) -> str:
    rows = []
    for d in found:
        kind = measure(d.measure)
        rows.append([kind.label, plain(d.alpha), *(kind.shown(v, True) for v in d.by_seed)])
    heads = ["difference in", "alpha", *(f"seed {seed}" for seed in seeds)]
    return _table(heads, rows) if rows else ""


def _losses(runs: Sequence[Run]) -> str:
    heads = ["alpha", "held-out loss before", "held-out loss after"]
    heads += ["training loss, last tenth of steps, noise on", "noise norm", "noise law"]
    rows = []
    for alpha in alphas_of(runs):
        these = [
            (r.first, r.last, r.training, r.mean("noise_norm"), r.mean("noise_law"))
            for r in runs
            if r.alpha == alpha
        ]
        rows.append([plain(alpha), *(f"{v:.4f}" for v in map(fmean, zip(*these, strict=True)))])
    return f"Means over the seeds.\n\n{_table(heads, rows)}\n\n{_means(runs, 'losses')}".strip()


def _means(runs: Sequence[Run], part: str) -> str:
    """Means over the seeds of the numbers in a part of the evaluations' summaries."""
    found: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        for key, value in run.part(part).items():
            number = value["accuracy"] if part == "tasks" else value
            if isinstance(number, int | float):
                found.setdefault(key, {}).setdefault(run.alpha, []).append(float(number))
    if not found:
        return ""
    heads = ["alpha", *(_LABELS.get(key, key) for key in found)]
    rows = [
        [plain(alpha), *(_figure(of.get(alpha)) for of in found.values())]
        for alpha in alphas_of(runs)
    ]
    name = "Accuracy after" if part == "tasks" else "After"
    return f"{name} training; means over the seeds.\n\n{_table(heads, rows)}"


def _judged(judged: Judged, base: float) -> str:
    if not judged:
        return ""
    heads = ["alpha", "seed", "win rate", "at equal lengths", "wins", "losses", "ties"]
    heads += ["not parsed", "request failed", "same in both orders"]
    rows = []
    for (alpha, seed), judgements in judged.items():
        rate = win_rate(judgements)
        shown = ["" if v is None else f"{v:.1f} %" for v in (rate.win_rate, rate.length_controlled)]
        counts = (rate.num_wins, rate.num_losses, rate.num_ties, rate.num_unparsed, rate.num_failed)
        agreement = "" if rate.order_agreement is None else f"{rate.order_agreement:.0f} %"
        rows.append([plain(alpha), str(seed), *shown, *map(str, counts), agreement])
    return f"Against the answers of alpha {plain(base)} at the same seed.\n\n{_table(heads, rows)}"


def _against_reference(runs: Sequence[Run]) -> str:
    """Where `judge.reference` names answers, with which `evaluate` compares each run's."""
    rows = []
    for run in runs:
        if rate := run.part("judge"):
            keys = ("win_rate", "length_controlled")
            shown = ["" if rate.get(key) is None else f"{rate[key]:.1f} %" for key in keys]
            rows.append([plain(run.alpha), str(run.seed), *shown])
    return _table(["alpha", "seed", "win rate", "at equal lengths"], rows) if rows else ""


def _tested(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _figure(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    mean = fmean(values)
    return f"{mean:.0f}" if mean.is_integer() and abs(mean) > 1 else f"{mean:.5g}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---:"] * len(heads), *rows]
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
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>Study of noise.alpha</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
