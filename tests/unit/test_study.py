"""The report of a study claims what its runs show and no more: planted effects are found, chance is
not, and the intervals hold what they promise."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neftune_dist.config import Config, UserError, with_checksum
from neftune_dist.evaluation.intervals import quantile, smallest_visible, student
from neftune_dist.evaluation.win_rate import Judgement, win_rate
from neftune_dist.study import grid, plots, report
from neftune_dist.study import run as verb
from neftune_dist.study.answers import side_by_side
from neftune_dist.study.compare import Difference, corrected, difference, paired
from neftune_dist.study.conclusion import conclusion
from neftune_dist.study.design import check_items, power_line
from neftune_dist.study.measures import differences, untested
from neftune_dist.study.results import Run, check_comparable, read_run
from neftune_dist.training.startup_report import device_name, versions

NUM_STEPS, NUM_ITEMS = 20, 120
Effects = dict[str, float]


def write_run(folder: Path, alpha: float, seed: int, effects: Effects, without: str = "") -> Path:
    """A finished run and its evaluation: every measure has an effect of the item, one of the seed,
    chance, and what `effects` adds at this alpha."""
    run = folder / f"alpha_{alpha:g}_seed_{seed}"
    evaluation = run / "evaluations" / f"step_{NUM_STEPS:08d}"
    evaluation.mkdir(parents=True)
    config = Config(run_dir=str(run))
    config.model.name_or_path, config.noise.alpha, config.train.seed = "a-model", alpha, seed
    config.data.num_held_out = NUM_ITEMS
    (run / "config.yaml").write_text(config.to_yaml())
    chance = np.random.default_rng([seed, round(10 * alpha)])

    def values(name: str, level: float, spread: float) -> np.ndarray:
        item = np.random.default_rng(len(name)).normal(size=NUM_ITEMS)
        of_seed = 0.2 * np.random.default_rng(1000 + seed).normal()
        own = 0.3 * chance.normal(size=NUM_ITEMS) + 0.02 * chance.normal()
        return level + spread * (item + of_seed + own) + effects.get(name, 0.0)

    steps = [
        {
            "step": i + 1,
            "loss": 3.0 - 0.05 * i + 0.01 * chance.normal(),
            "num_tokens": 90 + i + seed,
            "num_supervised_tokens": 30,
            "noise_norm": alpha / 3**0.5,
            "noise_law": alpha / 3**0.5,
        }
        for i in range(NUM_STEPS)
    ]
    tokens = np.random.default_rng(7).integers(5, 50, NUM_ITEMS)
    losses = values("held_out_loss", 2.0, 0.3)
    held_out = float((losses * tokens).sum() / tokens.sum())
    evaluations = [{"step": s, "held_out_loss": v} for s, v in ((0, 3.0), (NUM_STEPS, held_out))]
    for name, rows in (("metrics", steps), ("evaluations", evaluations)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    characters = values("characters", 400, 60)
    of_answers: dict[str, list[float | None]] = {
        "characters": characters.round().tolist(),
        "rouge_l": values("rouge_l", 0.3, 0.1).tolist(),
        "repetition_2_percent": [v if i % 3 else None for i, v in enumerate(values("rep", 4, 1))],
    }
    right = (values("arc_easy", 0.5, 0.4) > 0.5).astype(int).tolist()
    answers = [
        {"instruction": f"Say {i}.", "output": "x" * round(c), "generator": "m", "correct": None}
        for i, c in enumerate(characters)
    ]
    items = {
        "held_out": [[loss * n, int(n)] for loss, n in zip(losses, tokens, strict=True)],
        "answers": of_answers,
        "tasks": {"arc_easy": right},
    }
    numbers = {"num_documents": NUM_ITEMS, "num_supervised_tokens": 9, "num_train_documents": 0}
    none = {"perplexity": None, "train_loss": None, "train_loss_noisy": None}
    counts = {"num": NUM_ITEMS, "num_unparsed": 0, "num_failed": 0}
    intervals = {"interval": None, "length_controlled_interval": None}
    arc = {"accuracy": float(np.mean(right)), "standard_error": 0.1, "num_items": NUM_ITEMS}
    summary = {
        "subject": {"name": run.name, "step": NUM_STEPS, "alpha": alpha},
        "losses": {"held_out_loss": held_out, **none, **numbers},
        "answers": {"num": NUM_ITEMS, "characters": float(characters.mean()), "self_bleu": 0.25},
        "tasks": {"arc_easy": arc},
        "judge": {"win_rate": 50.0 + seed, "length_controlled": 50.0 - seed, **intervals, **counts},
    }
    for part in filter(None, without.split(",")):
        summary[part] = None
        items.pop(part, None)
        answers = [] if part == "answers" else answers
    write_results(evaluation, {"summary": summary, "items": items, "answers": answers})
    return run


def write_results(evaluation: Path, contents: dict[str, Any]) -> None:
    """The files of an evaluation as `evaluate` seals them."""
    text = json.dumps(contents.pop("answers"))
    (evaluation / "answers.json").write_text(text)
    settings = {"subject": "x", "answers_sha256": hashlib.sha256(text.encode()).hexdigest()}
    for name, content in (contents | {"settings": settings}).items():
        (evaluation / f"{name}.json").write_text(json.dumps(with_checksum(content)))


def make_runs(folder: Path, effects: Effects, num_seeds: int = 4, without: str = "") -> list[Run]:
    """Of alpha 0, and of alpha 5, which has the effects."""
    return [
        read_run(write_run(folder, alpha, seed, effects if alpha else {}, without), alpha, seed)
        for seed in range(num_seeds)
        for alpha in (0.0, 5.0)
    ]


def judgements(runs: list[Run], at_equal_lengths: float, of_length: float) -> Any:
    """By (alpha, seed), of a judge who likes alpha 5 by so much, and length by so much."""
    judged = {}
    for ours in (run for run in runs if run.alpha):
        theirs = next(run for run in runs if not run.alpha and run.seed == ours.seed)
        draw = np.random.default_rng(ours.seed)
        rows = []
        for one, two in zip(ours.answers, theirs.answers, strict=True):
            longer = np.tanh((len(one["output"]) - len(two["output"])) / 40)
            likes = 1 / (1 + np.exp(-(at_equal_lengths + of_length * longer)))
            preference = 1.0 + float(draw.random() < likes)
            lengths = len(one["output"]), len(two["output"])
            rows.append(Judgement(one["instruction"], preference, *lengths))
        judged[ours.alpha, ours.seed] = rows
    return judged


def concluded(runs: list[Run], judged: Any = None) -> str:
    return conclusion(differences(runs, judged or {}), len(runs) // 2)


def written(folder: Path, runs: list[Run], judged: Any = None) -> str:
    return report.write(folder, runs, judged or {}, ["Something: not asked for."])


def test_planted_effects_are_found_with_direction_and_size(tmp_path: Path) -> None:
    effects = {"held_out_loss": -0.1, "characters": 50, "rouge_l": -0.04, "arc_easy": 0.3}
    runs = make_runs(tmp_path, effects)
    text = concluded(runs)
    assert "better: held-out loss, accuracy on arc_easy; worse: ROUGE-L; different:" in text
    by_measure = {d.measure: d for d in differences(runs, {})}
    for name in ("held_out_loss", "characters", "rouge_l"):
        found = by_measure[name]
        assert found.is_significant and found.low < effects[name] < found.high
        assert (found.over, found.num_items) == ("seeds and items", NUM_ITEMS)
    assert re.search(r"- Losses: held-out loss lower by 0\.\d{4} \(-0\.\d+ to -0\.\d+\)\.", text)
    assert re.search(r"- Answers: length of answers greater by [45]\d\.\d characters \(\+", text)
    assert by_measure["repetition_2_percent"].num_items == NUM_ITEMS * 2 // 3


def test_no_effect_gives_no_difference(tmp_path: Path) -> None:
    text = concluded(make_runs(tmp_path, {}))
    assert "**alpha 5**: no difference seen.\n" in text
    assert "no difference seen in accuracy on arc_easy (" in text
    assert "points is ruled out" in text
    assert "Warning" not in text
    assert "5 comparisons were made" in text


def test_gain_explained_by_length_has_a_warning(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {"characters": 60})
    text = concluded(runs, judgements(runs, 0.0, 1.5))
    assert "**Warning:** the gain in win rate (" in text
    assert re.search(
        r"disappears once length is controlled \([4-6]\d\.\d+ %, not distinguishable", text
    )
    assert "better:" not in text and "win rate higher" in text
    assert "**Warning:** the answers only became longer, by " in text
    text = concluded(runs, judgements(runs, 1.5, 0.0))
    assert re.search(r"win rate at equal lengths [78]\d", text) and "above one half" in text
    assert "Warning" not in text


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_few_seeds_claim_no_effect(tmp_path: Path, num_seeds: int) -> None:
    runs = make_runs(tmp_path, {"held_out_loss": -0.1}, num_seeds)
    text = concluded(runs)
    seeds = "1 seed is" if num_seeds == 1 else "2 seeds are"
    assert f"**No effect of alpha is claimed: {seeds} too few to tell it from chance.**" in text
    assert "**alpha 5**: in these runs alone, better: held-out loss; no difference" in text
    assert {d.over for d in differences(runs, {})} == {"items"}


@pytest.mark.parametrize(
    ("without", "absent"),
    [
        ("tasks", ["## Abilities", "arc_easy", "plots/tasks.svg"]),
        ("answers", ["## Answers", "ROUGE-L", "plots/answers.svg"]),
        ("tasks,answers", ["## Abilities", "## Answers"]),
    ],
)
def test_unmeasured_parts_have_no_section(tmp_path: Path, without: str, absent: list[str]) -> None:
    text = written(tmp_path, make_runs(tmp_path, {}, 3, f"judge,{without}"))
    for part in [*absent, "## Judged", "| win rate |"]:
        assert part not in text
    assert "## Not measured\n\n- Something: not asked for." in text
    assert "plots/held_out_loss.svg" in text


def test_runs_without_an_evaluation_are_compared_by_their_own_held_out_loss(
    tmp_path: Path,
) -> None:
    runs = make_runs(tmp_path, {"held_out_loss": -0.1})
    (tmp_path / "alpha_5_seed_2/evaluations" / f"step_{NUM_STEPS:08d}" / "summary.json").unlink()
    runs = [read_run(run.folder, run.alpha, run.seed) for run in runs]
    (only,) = differences(runs, {})
    assert (only.measure, only.over, only.num_items) == ("held_out_loss", "seeds", 0)
    assert only.by_seed == pytest.approx(
        [five.last - zero.last for zero, five in zip(runs[::2], runs[1::2], strict=True)]
    )
    few = [run for run in runs if run.seed in (1, 2)]
    assert "held-out loss not tested: 2 seeds, at least 3 needed" in concluded(few)
    assert "**alpha 5**: nothing could be tested." in concluded(few)


def test_html_embeds_the_plots_of_the_markdown(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {}, 3)
    text = written(tmp_path, runs, judgements(runs, 0.3, 0.3))
    page = (tmp_path / "report.html").read_text()
    names = re.findall(r"!\[[\w ]+\]\(plots/(\w+)\.svg\)", text)
    assert {"training_loss", "held_out_loss", "answers", "tasks", "forest"} < set(names)
    assert len(re.findall('src="data:image/svg[+]xml;base64,', page)) == len(names)
    assert re.findall(r'(?:src|href)="(?!data:)([^"]*)', page) == ["answers.html"]
    assert "| 5 | 1 | 51.0 % | 49.0 % |" in text
    assert "<script" not in page and "<table>" in page
    before = {path: path.read_bytes() for path in tmp_path.glob("plots/*.svg")}
    assert {path.stem for path in before} == set(names)
    assert written(tmp_path, runs, judgements(runs, 0.3, 0.3)) == text
    assert {path: path.read_bytes() for path in before} == before


def change(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        (path,) = run.rglob(name)
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        if path.suffix == ".json":
            files = {
                name: path.with_name(f"{name}.json") for name in ("summary", "items", "answers")
            }
            contents = {name: json.loads(file.read_text()) for name, file in files.items()}
            contents["items"].pop("checksum"), contents["summary"].pop("checksum")
            write_results(path.parent, contents)

    return edit


def test_runs_that_differ_in_more_than_alpha_are_refused(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {}, 2)
    check_comparable(runs)
    run = runs.pop().folder
    before = {path: path.read_text() for path in run.rglob("*.*") if path.is_file()}
    for edit, what in (
        (change("metrics.jsonl", '"num_tokens": 91', '"num_tokens": 92'), "documents or steps"),
        (change("evaluations.jsonl", ": 3.0}", ": 3.1}"), "held-out loss before training"),
        (change("config.yaml", "warmup_steps: 0", "warmup_steps: 1"), "warmup_steps"),
        (change("answers.json", "Say 3.", "Tell 3."), "the instructions"),
        (change("items.json", "[0, ", "["), "the tasks"),
    ):
        edit(run)
        with pytest.raises(UserError, match=f"alpha_5_seed_1 differ in .*{what}"):
            check_comparable([*runs, read_run(run, 5.0, 1)])
        for path, text in before.items():
            path.write_text(text)
    check_comparable([*runs, read_run(run, 5.0, 1)])


def damaged(text: str, draw: random.Random) -> str:
    """A file of results cut off, or with a value of another type or without one somewhere."""
    if draw.random() < 0.2:
        return text[: draw.randrange(len(text))]
    content = json.loads(text)
    if draw.random() < 0.5 and isinstance(content, dict):
        content.pop("checksum")
    at: Any = content
    while isinstance(at, dict | list) and at:
        above, key = at, draw.choice([*at] if isinstance(at, dict) else range(len(at)))
        at = above[key]
        if draw.random() < 0.2:
            break
    above[key] = draw.choice([None, True, "x", [], {}, [[1]], -1, math.nan, 1e308, "\ud800"])
    return json.dumps(content)


@pytest.mark.parametrize("name", ["summary", "items", "answers", "settings"])
def test_damaged_results_are_one_sentence(tmp_path: Path, name: str) -> None:
    run, draw = write_run(tmp_path, 5.0, 0, {}), random.Random(0)
    (path,) = run.rglob(f"{name}.json")
    whole = path.read_text()
    for _ in range(60):
        path.write_text(text := damaged(whole, draw), errors="surrogatepass")
        if text != whole:
            with pytest.raises(UserError, match=rf"{name}\.json .*remove the folder"):
                read_run(run, 5.0, 0)
    path.unlink()
    if name == "summary":  # it has not been evaluated
        assert not read_run(run, 5.0, 0).items
    else:
        with pytest.raises(UserError, match=rf"{name}\.json cannot be read: .*; remove the folder"):
            read_run(run, 5.0, 0)


@pytest.mark.parametrize("num_seeds", [2, 3, 6])
@pytest.mark.parametrize("spread", [(0.0, 1.0, 1.0), (1.0, 0.0, 0.1), (1.0, 3.0, 3.0)])
def test_intervals_cover_the_true_difference_in_95_percent_of_studies(
    num_seeds: int, spread: tuple[float, float, float]
) -> None:
    """Errors of seeds, of items and of both, items of unequal weight. With 2 seeds the interval is
    over items alone, and covers the difference at these seeds."""
    draw, covered, num = np.random.default_rng(0), 0, 400
    for _ in range(num):
        of_seed = spread[0] * draw.normal(size=(num_seeds, 1))
        own = spread[1] * draw.normal(size=(1, 30)) + spread[2] * draw.normal(size=(num_seeds, 30))
        weights = np.broadcast_to(draw.integers(1, 9, 30), own.shape)
        truth = 0.5 if num_seeds > 2 else 0.5 + of_seed.mean()
        found = paired("x", 5, 0.5 + of_seed + own, np.zeros_like(own), weights)
        assert found is not None
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / num <= 0.985


def test_interval_over_3_seeds_is_4_303_standard_errors_to_either_side() -> None:
    by_seed = np.array([0.1, 0.4, 0.7])
    found = difference("held_out_loss", 5.0, 2.0 + by_seed, np.full(3, 2.0))
    assert (found.over, found.base) == ("seeds", 2.0) and found.value == pytest.approx(2.4)
    standard_error = by_seed.std(ddof=1) / math.sqrt(3)
    assert (found.high - found.mean) / standard_error == pytest.approx(4.303, abs=5e-4)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    # t = 4 * sqrt(3) / 3 = 2.309 with 2 degrees of freedom: p = 1 - t / sqrt(2 + t^2).
    t = found.mean / standard_error
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-4)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (10, 2.228), (30, 2.042), (1e9, 1.960)]
)
def test_students_distribution_has_the_tabulated_quantiles(degrees: float, quantile: float) -> None:
    found, p = student(quantile, degrees)
    assert found == pytest.approx(quantile, rel=3e-4) and p == pytest.approx(0.05, abs=5e-5)
    assert student(0.0, degrees)[1] == pytest.approx(1)


def test_variance_over_items_is_that_of_a_bootstrap_of_the_weighted_mean() -> None:
    draw = np.random.default_rng(1)
    weights = np.broadcast_to(draw.integers(1, 30, 200), (2, 200))
    values = draw.normal(size=(1, 200)) + draw.normal(size=(2, 200)) + 0.1 * weights
    found = paired("x", 5, values, np.zeros_like(values), weights)
    assert found is not None and found.over == "items"
    means = []
    for _ in range(2000):
        chosen = draw.integers(0, 200, 199)  # n - 1 draws: unbiased (Rao and Wu, JASA 1988)
        means.append(np.average(values[:, chosen], axis=1, weights=weights[:, chosen]).mean())
    # 1.972: Student's with 199 degrees of freedom.
    assert (found.mean - found.low) / 1.972 == pytest.approx(np.std(means), rel=0.06)


def test_sources_of_error_add_up_with_satterthwaites_degrees_of_freedom() -> None:
    by_seed, influences = np.array([0.1, 0.4, 0.7]), np.linspace(-0.1, 0.1, 9)
    found = difference("x", 5, by_seed, np.zeros(3), influences)
    seeds, items = by_seed.var(ddof=1) / 3, 9 * influences.var(ddof=1)
    degrees = (seeds + items) ** 2 / (seeds**2 / 2 + items**2 / 8)
    reach = student(0, degrees)[0] * math.sqrt(seeds + items)
    assert found.high == pytest.approx(found.mean + reach) and found.over == "seeds and items"


@pytest.mark.parametrize("copies", [1, 3])
def test_copies_of_a_document_narrow_no_interval_of_a_loss(copies: int) -> None:
    draw = np.random.default_rng(2)
    losses, base = 2 + draw.normal(size=(3, 40)), 2 + draw.normal(size=(3, 40))
    weights = np.broadcast_to(draw.integers(1, 9, 40), (3, 40))
    once = paired("train_loss", 5, losses, base, weights)
    found = paired(
        "train_loss", 5, *(np.repeat(a, copies, axis=1) for a in (losses, base, weights))
    )
    assert once and found and found.num_items == once.num_items == 40
    assert found.low == pytest.approx(once.low) and found.high == pytest.approx(once.high)
    # Answers may be right or wrong alike without being copies.
    right = np.tile([[1.0, 0.0, 1.0, 1.0]], (1, 10))
    alike = paired("exact_match", 5, right, 1 - right, np.ones_like(right))
    assert alike and alike.num_items == 40


def test_items_without_a_value_do_not_count() -> None:
    values = np.array([[1.0, 2.0, np.nan] * 5])
    base = np.array([[0.5, 1.0, 3.0] * 5])
    found = paired("x", 5, values, base, np.array([[1.0, 3.0, 0.0] * 5]))
    assert found is not None
    assert found.by_seed == (pytest.approx((0.5 + 3 * 1.0) / 4),)
    assert (found.value, found.base) == (pytest.approx(7 / 4), pytest.approx(3.5 / 4))
    assert (found.num_items, found.over) == (10, "items")
    assert paired("x", 5, values, base, np.zeros((1, 15))) is None
    of_loss = paired("held_out_loss", 5, values, base, np.array([[1.0, 3.0, 0.0] * 5]))
    assert of_loss and of_loss.num_items == 2  # copies of two documents
    weights = np.repeat([[1.0], [0.0]], 15, axis=1)  # none at the second of two seeds
    assert paired("x", 5, np.tile(values, (2, 1)), np.tile(base, (2, 1)), weights) is None


def test_holm_corrects_for_every_comparison() -> None:
    ps = [0.01, 0.04, 0.03, math.nan]
    found = corrected([Difference("x", 5, 0, 0, (1.0,), 0.1, 2, p, "items", 9) for p in ps])
    expected = [0.03, 0.06, 0.06, math.nan]
    assert [d.p_holm for d in found] == pytest.approx(expected, nan_ok=True)
    assert [d.is_significant for d in found] == [True, False, False, False]


def test_effect_explained_by_many_comparisons_is_not_claimed(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {})
    difference = Difference("rouge_l", 5.0, 0.3, 0.31, (0.01,) * 3, 0.001, 0.02, 0.04, "seeds", 0)
    others = [Difference("bleu", 5.0, 0.3, 0.3, (0.0,) * 3, -1, 1, 0.9, "seeds", 0)] * 3
    text = conclusion(corrected([difference, *others]), len(runs) // 2)
    assert "no significant difference; perhaps by chance: ROUGE-L" in text
    assert "may be chance among so many comparisons" in text


def test_html_in_names_is_shown_as_text() -> None:
    text = (
        "# <script>a</script>\n\n<img src=x onerror=a>\n\n[b](javascript:c) ![d](http://e/f.png) "
        "<http://g>\n\n![losses](plots/losses.svg)\n\n![h](plots/h.svg)\n\n"
        "| i | j |\n|---|---|\n| <b>k</b> | `<i>` |\n"
    )
    page = report._html(text, {"losses": b"<svg/>"})
    body = page[page.index("<body>") :]
    assert not re.search(r"<(script|a|b|i)\b", body) and "&lt;script&gt;" in body
    assert re.findall(r"<img [^>]*>", body) == [
        '<img alt="losses" src="data:image/svg+xml;base64,PHN2Zy8+" />'
    ]


def test_prediction_noise_and_item_noise_are_told_apart() -> None:
    """Over many sets of answers to the same items the mean moves by the prediction noise alone, and
    over sets of items by both. Draws are shared by all seeds, as those of `evaluate` are."""
    draw, num_items, num_answers = np.random.default_rng(3), 60, 4
    level = np.linspace(-9, 9, num_items)  # of the base's answers

    def study(item: np.ndarray) -> Difference:
        shared = 2.0 * draw.normal(size=(1, num_items, num_answers))
        values = item[None, :, None] + shared + 0.1 * draw.normal(size=(2, num_items, num_answers))
        base = np.broadcast_to(level[None, :, None], values.shape)
        found = paired("rouge_l", 5, values + base, base, np.ones_like(values))
        assert found is not None and found.num_items == num_items
        return found

    same = draw.normal(size=num_items)
    of_answers = [study(same) for _ in range(400)]
    of_items = [study(draw.normal(size=num_items)) for _ in range(400)]
    prediction = np.sqrt(np.mean([d.prediction_error**2 for d in of_answers]))
    assert prediction == pytest.approx(np.std([d.mean for d in of_answers]), rel=0.08)
    errors = np.mean([[d.error**2, d.item_error**2] for d in of_items], axis=0) ** 0.5
    assert errors[0] == pytest.approx(np.std([d.mean for d in of_items]), rel=0.08)
    assert errors[1] == pytest.approx(1 / math.sqrt(num_items), rel=0.1)
    once = paired("rouge_l", 5, same[None], 0 * same[None], np.ones((1, num_items)))
    assert once and math.isnan(once.prediction_error) and math.isnan(once.item_error)


def test_answer_without_a_value_leaves_the_items_mean_to_the_others() -> None:
    values = np.array([[[1.0, 3.0], [np.nan, 5.0]] * 4])
    base = np.array([[[0.0, 0.0], [0.0, 1.0]] * 4])
    found = paired("x", 5, values, base, 1.0 - np.isnan(values))
    assert found and (found.value, found.base) == ((2 + 5) / 2, (0 + 1) / 2)
    assert found.num_items == 8 and found.prediction_error > 0


@pytest.mark.parametrize("num_seeds", [3, 8])
def test_smallest_visible_difference_is_seen_in_4_of_5_studies(num_seeds: int) -> None:
    draw, seen = np.random.default_rng(5), 0
    true = smallest_visible(num_seeds - 1) / math.sqrt(num_seeds)
    for by_seed in true + draw.normal(size=(2000, num_seeds)):
        seen += difference("x", 5, by_seed, np.zeros(num_seeds)).excludes_0
    assert seen / 2000 == pytest.approx(0.8, abs=0.04)
    # 4.303 + 1.061, as tables of Student's distribution have them.
    assert smallest_visible(2) == pytest.approx(5.364, abs=2e-3)
    assert quantile(0.8, 2) == pytest.approx(1.0607, abs=1e-3)
    found = difference("x", 5, np.array([0.1, 0.4, 0.7]), np.zeros(3))
    assert found.visible == pytest.approx(smallest_visible(2) * found.error)


def test_report_has_the_reason_where_nothing_was_compared(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {}, 2)
    for run in runs:
        answers = run.items["answers"]
        answers["repetition_2_percent"] = [1.0] * 4 + [None] * (NUM_ITEMS - 4)
        answers["log_diversity"] = [None] * (NUM_ITEMS - 9)
        answers["log_diversity"] += (
            [9.0, None] * 4 + [None] if run.alpha else [None, 9.0] * 4 + [None]
        )
    del runs[0].items["answers"]["rouge_l"]
    text = written(tmp_path, runs)
    reason = "not tested: 4 items, at least 8 needed"
    assert f"repetition of 2-grams {reason}" in text and f"| {reason} |" in text
    assert "- ROUGE-L, alpha 5: 3 of 4 runs have values." in text
    assert "- Log-diversity, alpha 5: at a seed, no item has a value in both runs." in text
    assert "no difference seen in repetition" not in text
    assert untested(make_runs(tmp_path / "whole", {}, 2), differences(runs, {}))


def test_forest_plot_shows_every_difference_in_its_standard_errors(tmp_path: Path) -> None:
    found = differences(make_runs(tmp_path, {"held_out_loss": -0.1, "characters": 50}), {})
    figure = plots._forest(found)
    assert figure is not None
    (axes,) = figure.axes
    labels = [tick.get_text() for tick in axes.get_yticklabels()]
    assert labels[:2] == ["held-out loss", "length of answers"] and len(labels) == len(found)
    points = [
        line for line in axes.lines if line.get_marker() == "o" and len(line.get_xdata()) == 1
    ]
    assert [point.get_xdata()[0] for point in points] == [d.mean / d.error for d in found]
    filled = [point.get_markerfacecolor() != "none" for point in points]
    assert filled == [d.is_significant for d in found] and {True, False} == set(filled)
    ends = [part.get_segments()[0][:, 0].tolist() for part in axes.collections]
    assert ends == [[d.low / d.error, d.high / d.error] for d in found]


def test_answers_shown_are_those_of_the_least_hashes_as_text(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {}, 2)
    hashes = {hashlib.sha256(f"Say {i}.".encode()).hexdigest(): i for i in range(NUM_ITEMS)}
    first = hashes[min(hashes)]
    for run in runs:
        run.answers[first]["output"] = "<b>1 | 2</b>\n\n* [a](http://x) " + f"of {run.alpha:g}"
    text = written(tmp_path, runs)
    shown = [int(number) for number in re.findall(r"^\*\*\d\.\*\* Say (\d+)", text, re.M)]
    assert shown == [hashes[key] for key in sorted(hashes)[:5]]
    assert r"&lt;b&gt;1 \| 2&lt;/b&gt;<br>\* \[a\]\(http&#58;//x\) of 0 | " in text
    page = (tmp_path / "report.html").read_text()
    cell = "<td{}>&lt;b&gt;1 | 2&lt;/b&gt;<br>* [a](http&#58;//x) of {}</td>"
    aligned = ' style="text-align: left;"'
    assert cell.format(aligned, 0) in page and cell.format(aligned, 5) in page
    every = (tmp_path / "answers.md").read_text()
    assert len(re.findall(r"^\*\*\d+\.\*\* Say", every, re.M)) == NUM_ITEMS
    assert (tmp_path / "answers.html").exists() and "[All of them](answers.md)" in text
    assert side_by_side([run for run in runs if run.alpha]).count("alpha 0") == 0
    runs[0].answers.clear()
    assert side_by_side(runs).startswith("Seed 1.")


def test_report_says_what_was_run_on_what(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {}, 2)
    for run in runs:
        run.config.data.source = "/home/me/rows.json"
        run.state.update(
            versions={"neftune_dist": "1.2", "commit": "abc", "torch": f"2.{run.seed}"},
            device="A processor",
            identity={"dataset": "f00d"},
            world_size=2,
        )
        run.settings["answers"] = {"prompts": "x", "evaluate.samples": 4}
    text = written(tmp_path, runs)
    table = dict(re.findall(r"^- (\w[\w ]*): (.*)$", text.partition("## Provenance")[2], re.M))
    assert table["code"] == "neftune_dist 1.2, commit abc"
    assert table["versions"] == "torch 2.0 and 2.1"
    assert table["data"].startswith("rows.json; fingerprint f00d")
    assert table["answers"] == "samples 4" and table["seeds"] == "0, 1"
    assert table["device"].startswith("A processor; ranks: 2; ")
    assert table["learning rate"].startswith("5e-05") and table["steps"] == str(NUM_STEPS)
    assert re.match(r"20\d\d-\d\d-\d\d", table["made"]) and "/home/me" not in text


def test_power_is_stated_before_the_runs(tmp_path: Path) -> None:
    config = Config()
    config.data.num_held_out, config.evaluate.max_instructions = 100, 40
    config.evaluate.max_documents = 64
    line = power_line(config, 3)
    assert "3.10 over 3 seeds; 0.36 over 64 held-out documents; 0.45 over 40 instr" in line
    assert "seeds remain unknown" in power_line(config, 2) and "over 2 seeds" not in power_line(
        config, 2
    )
    text = report.write(tmp_path, make_runs(tmp_path, {}, 3), {}, [], line)
    assert line in text and re.search(r"held-out loss \| 5 .* to [+-]0\.\d{4} \| 0\.\d{4} \|", text)


@pytest.mark.parametrize(
    ("key", "number"),
    [
        ("data.num_held_out", 1),
        ("evaluate.max_documents", 1),
        ("evaluate.train_documents", 7),
        ("evaluate.max_instructions", 1),
        ("evaluate.max_task_items", 1),
    ],
)
def test_study_of_too_few_items_is_refused(key: str, number: int) -> None:
    config = Config()
    config.data.num_held_out = 100
    check_items(config)
    section, name = key.split(".")
    setattr(getattr(config, section), name, number)
    with pytest.raises(UserError, match=rf"{key}={number}: .*{number} item.*at least 8"):
        check_items(config)


def test_study_of_one_instruction_in_a_file_is_refused(tmp_path: Path) -> None:
    config = Config()
    config.data.num_held_out = 100
    config.evaluate.instructions = str(tmp_path / "asked.json")
    (tmp_path / "asked.json").write_text(json.dumps([{"instruction": "A"}]))
    with pytest.raises(UserError, match=r"evaluate\.instructions=.*asked\.json: .*1 item "):
        check_items(config)


def test_time_left_is_that_of_the_runs_made_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [(0.0, 0), (5.0, 0), (0.0, 1), (5.0, 1)]
    now = 0.0
    monkeypatch.setattr(verb.time, "monotonic", lambda: now)
    kept = tmp_path / "alpha_5_seed_0" / "evaluations" / "step_00000001"
    kept.mkdir(parents=True)
    (kept / "summary.json").touch()

    def run(alpha: float, seed: int) -> tuple[int, str]:
        nonlocal now
        now += 1.0 if (alpha, seed) == (5.0, 0) else 360.0
        return 0, ""

    assert verb._make(range(4), places, tmp_path, run) == 0
    assert capsys.readouterr().out.splitlines() == [
        "study: run 1 of 4 (alpha 0, seed 0)",
        "study: run 2 of 4 (alpha 5, seed 0), about 12 min left",
        "study: run 3 of 4 (alpha 0, seed 1), about 12 min left",
        "study: run 4 of 4 (alpha 5, seed 1), about 6 min left",
    ]


def test_win_rate_over_like_lengths_leaves_out_the_other_pairs() -> None:
    rows = [Judgement("i", 2.0, 100, 100)] * 9 + [Judgement("i", 1.0, 100, 112)] * 9
    rows += [Judgement("i", 1.0, 100, 110)] * 3
    found = win_rate(rows)
    assert (found["length_matched"], found["num_length_matched"]) == (75.0, 12)
    assert win_rate([Judgement("i", 1.0, 9, 99)])["length_matched"] is None


def test_like_lengths_are_compared_beside_the_other_win_rates(tmp_path: Path) -> None:
    runs = make_runs(tmp_path, {}, 1)
    found = {d.measure: d for d in differences(runs, judgements(runs, 1.0, 0.0))}
    matched, raw = found["win_rate_length_matched"], found["win_rate"]
    rates = [win_rate(of)["length_matched"] for of in judgements(runs, 1.0, 0.0).values()]
    assert matched.value == pytest.approx(np.mean(rates))
    assert matched.num_items < raw.num_items == NUM_ITEMS


def test_run_that_a_signal_ended_is_said_to_be(capfd: pytest.CaptureFixture[str]) -> None:
    script = "import os, sys; print('a warning', file=sys.stderr); os.kill(os.getpid(), {})"
    killed = grid.execute([sys.executable, "-c", script.format(9)])
    assert killed == (-9, "ended by SIGKILL, perhaps out of memory")
    assert grid.execute([sys.executable, "-c", script.format(11)]) == (-11, "ended by SIGSEGV")
    assert capfd.readouterr().err.count("a warning") == 2


def test_commit_and_processor_are_known_to_the_runs() -> None:
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    if not (root / ".git").exists():
        pytest.skip("no checkout")
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert versions()["commit"].removesuffix("-dirty") == commit
    assert device_name(torch.device("cpu")).strip()
