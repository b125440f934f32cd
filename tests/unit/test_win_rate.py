"""Win rates: the published one of Alpaca-7B, made-up judges, intervals, and files that differ."""

from __future__ import annotations

import gzip
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neftune_dist.config import UserError
from neftune_dist.evaluation.win_rate import (
    Judgement,
    length_controlled_influences,
    pair,
    read_answers,
    win_rate,
)


def judged(preference: float | None, ours: int = 10, theirs: int = 10, **other: Any) -> Judgement:
    return Judgement("i", preference, ours, theirs, **other)


def answers(*instructions: str) -> list[dict[str, Any]]:
    return [{"instruction": asked, "output": f"{i}"} for i, asked in enumerate(instructions)]


def read_annotations(path: Path) -> list[Judgement]:
    """AlpacaEval's annotations: `output_2` is ours, `preference` 1 .. 2, or 0 for a tie."""
    return [
        Judgement.of(
            {"instruction": row["instruction"], "output": row["output_2"]},
            {"output": row["output_1"]},
            row["preference"] or 1.5,
        )
        for row in json.loads(gzip.decompress(path.read_bytes()))
    ]


def test_published_win_rate_of_alpaca_7b(alpaca_eval: Path) -> None:
    """AlpacaEval's leaderboard of GPT-4: 26.459627329192543, standard error 1.535711469748; 205
    wins, 584 losses, 16 draws. Its length-controlled rate, with instructions' difficulties from
    all models there, is 26.29."""
    path = alpaca_eval / "alpaca-7b.gpt4_annotations.json.gz"
    found = win_rate(read_annotations(path))
    assert found["win_rate"] == pytest.approx(26.459627329192543, abs=1e-12)
    assert found["standard_error"] == pytest.approx(1.535711469748, abs=1e-12)
    assert (found["num_wins"], found["num_losses"], found["num_ties"]) == (205, 584, 16)
    assert (found["num"], found["num_unparsed"], found["num_failed"]) == (805, 0, 0)
    assert found["interval"] == (pytest.approx(23.5, abs=0.3), pytest.approx(29.5, abs=0.3))
    assert found["length_controlled"] == pytest.approx(26.29, abs=1)
    assert found["mean_length"] == pytest.approx(396.29, abs=0.01)
    # Ends of 20,000 bootstrap resamples' percentiles.
    low, high = found["length_controlled_interval"]
    assert (low, high) == (pytest.approx(22.8, abs=0.3), pytest.approx(29.1, abs=0.3))


def test_alpaca_evals_package_gives_the_same_rate(alpaca_eval: Path) -> None:
    metrics = pytest.importorskip("alpaca_eval.metrics", reason="alpaca_eval is not installed")
    path = alpaca_eval / "alpaca-7b.gpt4_annotations.json.gz"
    theirs = metrics.get_winrate(json.loads(gzip.decompress(path.read_bytes())))
    ours = win_rate(read_annotations(path))
    assert ours["win_rate"] == pytest.approx(theirs["win_rate"], abs=1e-9)
    assert ours["standard_error"] == pytest.approx(theirs["standard_error"], abs=1e-9)
    assert (ours["num_wins"], ours["num_ties"]) == (theirs["n_wins"], theirs["n_draws"])


def test_judgements_without_preference_are_counted_apart() -> None:
    rows = [judged(2), judged(1), judged(1.5), judged(None), judged(None, failed=True)]
    found = win_rate(rows)
    assert (found["win_rate"], found["num"]) == (50, 5)
    assert (found["num_wins"], found["num_losses"], found["num_ties"]) == (1, 1, 1)
    assert (found["num_unparsed"], found["num_failed"]) == (1, 1)


def test_fractional_preferences_are_averaged() -> None:
    found = win_rate([judged(1.25), judged(1.75), judged(1.9)])
    assert found["win_rate"] == pytest.approx(100 * (0.25 + 0.75 + 0.9) / 3)
    assert (found["num_wins"], found["num_losses"]) == (2, 1)


def test_no_preference_at_all_is_no_rate() -> None:
    found = win_rate([judged(None), judged(None, failed=True)])
    assert (found["win_rate"], found["interval"], found["length_controlled"]) == (None, None, None)
    assert (found["num"], found["num_unparsed"], found["num_failed"]) == (2, 1, 1)
    assert json.loads(json.dumps(win_rate([])))["num"] == 0


@pytest.mark.parametrize(("preference", "rate"), [(2.0, 100.0), (1.0, 0.0)])
def test_all_won_or_all_lost_stays_finite(preference: float, rate: float) -> None:
    found = win_rate([judged(preference, ours=10 + i) for i in range(40)])
    assert found["win_rate"] == rate and found["interval"] == (rate, rate)
    assert found["length_controlled"] == pytest.approx(rate, abs=1)


def test_length_control_removes_a_preference_for_length() -> None:
    """The longer answer wins at odds of e^2 : 1, whoever gave it, and ours is mostly the longer."""
    rng = np.random.default_rng(1)
    rows = []
    for _ in range(1500):
        difference = float(rng.normal(250, 300))
        chance = 1 / (1 + np.exp(-2 * np.tanh(difference / 300)))
        rows.append(judged(2.0 if rng.random() < chance else 1.0, 1000 + int(difference), 1000))
    found = win_rate(rows)
    assert found["win_rate"] > 68
    assert found["length_controlled"] == pytest.approx(50, abs=5)
    low, high = found["length_controlled_interval"]
    assert low < 50 < high and found["interval"][0] > 60


def test_length_control_keeps_a_real_advantage() -> None:
    rng = np.random.default_rng(2)
    rows = [
        judged(2.0 if rng.random() < 0.7 else 1.0, int(rng.integers(50, 150)), 100)
        for _ in range(1000)
    ]
    found = win_rate(rows)
    assert found["length_controlled"] == pytest.approx(found["win_rate"], abs=1)
    assert found["length_controlled"] == pytest.approx(70, abs=4)


def test_without_differences_in_length_both_rates_agree() -> None:
    found = win_rate([judged(2.0)] * 30 + [judged(1.0)] * 70)
    assert found["length_controlled"] == pytest.approx(30, abs=0.01)


@pytest.mark.parametrize("length_effect", [0.0, 1.5])
def test_both_intervals_cover_the_true_rate_in_95_percent_of_cases(length_effect: float) -> None:
    """At equal lengths ours wins in 30 % of cases; its raw rate is higher where length counts."""
    rng = np.random.default_rng(3)
    intercept = np.log(0.3 / 0.7)

    def made(n: int) -> list[Judgement]:
        lengths = rng.normal(100, 100, n).round()
        deviation = lengths.std(ddof=1)
        chance = 1 / (1 + np.exp(-(intercept + length_effect * np.tanh(lengths / deviation))))
        won = rng.random(n) < chance
        return [
            judged(2.0 if w else 1.0, 1000 + int(d), 1000)
            for w, d in zip(won, lengths, strict=True)
        ]

    truth = win_rate(made(100_000))["win_rate"]
    raw = controlled = 0
    for _ in range(200):
        found = win_rate(made(400))
        raw += found["interval"][0] <= truth <= found["interval"][1]
        low, high = found["length_controlled_interval"]
        controlled += low <= 30 <= high
    assert 183 <= raw <= 198 and 180 <= controlled <= 199  # b is shrunk towards 0


def test_interval_of_three_instructions_is_students_with_two_degrees_of_freedom() -> None:
    found = win_rate([judged(p, 100, 100) for p in (1.45, 1.5, 1.58)])
    error = found["standard_error"]
    assert error == pytest.approx(100 * statistics.stdev([0.45, 0.5, 0.58]) / math.sqrt(3))
    assert found["interval"] == pytest.approx(
        (found["win_rate"] - 4.302653 * error, found["win_rate"] + 4.302653 * error), abs=1e-4
    )


def test_every_instruction_has_an_influence_on_the_rate_and_none_without_a_preference() -> None:
    rows = [judged(p, ours, 100) for p, ours in ((2.0, 90), (1.0, 130), (None, 100), (None, 80))]
    found = length_controlled_influences(rows)
    assert found.shape == (4,) and found[2] == found[3] == 0 and found[0] > 0 > found[1]


def test_one_judgement_has_no_interval() -> None:
    found = win_rate([judged(2.0)])
    assert (found["win_rate"], found["interval"], found["length_controlled_interval"]) == (
        100,
        None,
        None,
    )


def test_orders_agree_or_show_position_bias() -> None:
    """Orders: theirs shown first, then ours."""
    always_first = judged(1.5, orders=(1.0, 2.0))
    found = win_rate([always_first] * 3)
    assert (found["order_agreement"], found["first_shown"]) == (0, 100)
    fair = [judged(2.0, orders=(2.0, 2.0)), judged(1.0, orders=(1.0, 1.0))]
    found = win_rate(fair)
    assert (found["order_agreement"], found["first_shown"]) == (100, 50)
    half = replace(always_first, preference=None, orders=(None, 2.0))  # not known
    assert win_rate([half, *fair])["order_agreement"] == 100
    assert win_rate([judged(2.0)])["order_agreement"] is None


def test_answers_are_paired_by_instruction() -> None:
    ours, theirs = answers("b", "a", "a"), answers("a", "b", "a", "more")
    assert [(o["output"], t["output"]) for o, t in pair(ours, theirs)] == [
        ("0", "1"),
        ("1", "0"),
        ("2", "2"),
    ]


def test_answers_to_other_instructions_are_refused() -> None:
    with pytest.raises(UserError, match=r"number 2 of the first is to 'xx.*\.\.\.', which"):
        pair(answers("a", "x" * 500), answers("a", "b"))
    with pytest.raises(UserError, match="number 2"):  # asked twice, answered once
        pair(answers("a", "a"), answers("a", "b"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "holds no row"),
        ('[{"instruction": "i", "output": "o"}', "not valid JSON after row 1"),
        ("[1]", "row 1: not an object of fields"),
        ('[{"instruction": "i"}]', "row 1: the field 'output' is missing or no text"),
        ('[{"instruction": "i", "output": "\\ud800"}]', "row 1: field 'output' holds a lone surr"),
        ('[{"instruction": 3, "output": "o"}]', "row 1: the field 'instruction' is missing or no"),
        ('[{"instruction": "i", "output": "o"}, {"output": "o"}]', "row 2: the field 'instruction"),
    ],
)
def test_broken_files_are_named(content: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"judge\.reference={path}.*{says}"):
        read_answers(str(path))


def test_missing_and_torn_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge\.reference=.*none\.json does not exist"):
        read_answers(str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"judge\.reference=org/name is no file"):
        read_answers("org/name")
    path = tmp_path / "torn.json.gz"
    path.write_bytes(gzip.compress(b'[{"instruction": "i", "output": "o"}]' * 50)[:60])
    with pytest.raises(UserError, match=r"torn\.json\.gz is a damaged gzip file"):
        read_answers(str(path))


def test_answers_keep_their_other_fields(tmp_path: Path) -> None:
    rows = [{"instruction": "i", "output": "\x1b[1m", "generator": "g"}]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    assert read_answers(str(tmp_path / "a.json.gz")) == rows


def test_samples_of_an_answer_are_one_item_of_the_interval() -> None:
    rng = np.random.default_rng(4)
    once = [
        judged(2.0 if rng.random() < 0.6 else 1.0, int(rng.integers(50, 150)), 100)
        for _ in range(60)
    ]
    four = [replace(j, sample=sample) for j in once for sample in range(4)]
    one, several = win_rate(once), win_rate(four)
    assert several["win_rate"] == pytest.approx(one["win_rate"]) and several["num"] == 240
    assert several["standard_error"] == pytest.approx(one["standard_error"])
    assert several["interval"] == pytest.approx(one["interval"])
    # Four times the judgements shrink b a little less towards 0.
    assert several["length_controlled_interval"] == pytest.approx(
        one["length_controlled_interval"], abs=0.1
    )
    # A sample without a verdict does not join the instruction after it to the one before.
    four[4] = replace(four[4], preference=None)
    assert win_rate(four)["standard_error"] == pytest.approx(one["standard_error"], rel=0.02)


def test_samples_are_paired_with_the_only_answer_of_the_other_side() -> None:
    ours = [{**row, "sample": s} for row in answers("a", "a", "b") for s in range(2)]
    theirs = answers("a", "b", "a")
    assert [other["output"] for _, other in pair(ours, theirs)] == ["0", "0", "2", "2", "1", "1"]
    sampled = [{**row, "sample": s, "output": f"{s}"} for row in answers("a") for s in range(2)]
    assert [other["output"] for _, other in pair(sampled, sampled)] == ["0", "1"]
    with pytest.raises(UserError, match="number 3 of the first"):
        pair(ours, theirs[:1])
