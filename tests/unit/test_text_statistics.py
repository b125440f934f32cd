"""Text statistics: the paper's definitions by hand, real answers, and what is left out."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.evaluation import text_statistics


def row(output: str, **others: Any) -> dict[str, Any]:
    return {"instruction": "i", "output": output, **others}


def distinct(num: int) -> list[str]:
    return [f"w{i}" for i in range(num)]


def test_lengths_cut_and_empty_shares() -> None:
    answers = [
        row("two words", num_tokens=3, finished=True),
        row(" \n", num_tokens=1, finished=False),
        row("näh", num_tokens=8, finished=False),
    ]
    found = text_statistics.statistics(answers)
    assert (found["characters"], found["words"], found["tokens"]) == (14 / 3, 1.0, 4.0)
    assert (found["empty"], found["cut"]) == (1 / 3, 2 / 3)
    assert text_statistics.per_answer(answers)["characters"] == [9, 2, 3]


def test_exact_match_is_the_share_of_marked_answers_that_are_right() -> None:
    answers = [row("a", correct=True), row("b", correct=False), row("c", correct=None), row("d")]
    assert text_statistics.per_answer(answers)["exact_match"] == [1, 0, None, None]
    assert text_statistics.statistics(answers)["exact_match"] == 0.5
    assert "exact_match" not in text_statistics.statistics(answers[2:])


def test_repetition_uses_the_first_50_words() -> None:
    """48 2-grams of 50 words are counted, as in the released code: here three of them recur."""
    words = distinct(46) + distinct(4)
    values = text_statistics.per_answer(
        [row(" ".join(words + ["w0"] * 100)), row(" ".join(words[:49]))]
    )
    # After w45: (w45 w0), (w0 w1), (w1 w2); the last, (w2 w3), is not counted.
    assert values["repetition_2_percent"][0] == pytest.approx(100 * 2 / 48)
    assert values["repetition_3_percent"][0] == pytest.approx(100 * 1 / 47)
    assert values["repetition_4_percent"][0] == 0
    diversity = (1 - 2 / 48 / 100) * (1 - 1 / 47 / 100)
    assert values["log_diversity"][0] == pytest.approx(-math.log(1 - diversity))
    assert values["log_diversity"][1] is None  # 49 words
    assert (
        text_statistics.statistics([row(" ".join(words))] * 3 + [row("short")])["num_chunks"] == 3
    )


def test_log_diversity_without_repetition_is_20() -> None:
    values = text_statistics.per_answer([row(" ".join(distinct(50)))])
    assert values["repetition_2_percent"] == [0] and values["log_diversity"] == [20]


def test_rouge_and_bleu_against_the_expected_answer() -> None:
    answers = [
        row("The cat sat on the mat.", reference="the cat sat on the mat"),
        row("The cat sat there today", reference="A cat was there"),  # cat, there
        row("said without one", reference=None),
        row("", reference="something"),
    ]
    values = text_statistics.per_answer(answers)
    assert values["rouge_l"] == [1, pytest.approx(2 * (2 / 5) * (2 / 4) / (2 / 5 + 2 / 4)), None, 0]
    assert values["bleu"][2:] == [None, 0]
    same = text_statistics.per_answer(
        [row("the cat sat", reference="the cat sat")]
    )  # shorter than 4 words
    assert same["bleu"] == [pytest.approx(1)]
    assert text_statistics.statistics(answers)["num_references"] == 3


def test_rouge_is_left_out_where_it_knows_no_word_of_the_expected_answer() -> None:
    """It reads a to z and digits alone: of equal answers in Japanese it would be 0."""
    rows = [{"output": "日本語", "reference": "日本語"}, {"output": "a b", "reference": "a b"}]
    values = text_statistics.per_answer(rows)
    assert (values["rouge_l"], values["bleu"]) == ([None, 1.0], pytest.approx([1.0, 1.0]))
    assert text_statistics.statistics(rows)["num_references"] == 2


def test_self_bleu_is_lower_for_diverse_answers() -> None:
    same = text_statistics.statistics([row("all of these words are said again")] * 4)
    other = text_statistics.statistics(
        [row(" ".join(f"{i}{word}" for word in distinct(9))) for i in range(4)]
    )
    assert same["self_bleu"] == pytest.approx(1) and other["self_bleu"] < 0.1


def test_statistics_without_data_are_left_out() -> None:
    found = text_statistics.statistics([row("words")])
    assert not {"tokens", "cut", "rouge_l", "bleu", "log_diversity", "self_bleu"} & set(found)
    assert (found["num_chunks"], found["num_references"]) == (0, 0)


def test_statistics_of_alpaca_7bs_answers(alpaca_eval: Path) -> None:
    """Alpaca-7B's 805: its leaderboard length is 396 characters."""
    packed = (alpaca_eval / "alpaca-7b.outputs.json.gz").read_bytes()
    found = text_statistics.statistics(json.loads(gzip.decompress(packed)))
    rounded = {name: round(value, 2) for name, value in found.items()}
    assert rounded == {
        "characters": 396.29,
        "words": 66.06,
        "repetition_2_percent": 5.03,
        "repetition_3_percent": 1.96,
        "repetition_4_percent": 0.88,
        "log_diversity": 11.05,
        "empty": 0.0,
        "num_chunks": 468,
        "num_references": 0,
        "self_bleu": 0.07,
    }


def test_figures_are_means_over_instructions_of_means_over_their_samples() -> None:
    words = " ".join(distinct(50))
    answers = [
        row(words, sample=0, correct=True),
        row("short", sample=1),
        row("a b", sample=0, correct=False),
        row("a b c d", sample=1, correct=False),
    ]
    found = text_statistics.statistics(answers)
    assert found["words"] == ((50 + 1) / 2 + (2 + 4) / 2) / 2
    # The answer that was not marked leaves its item's mean to the other.
    assert (found["exact_match"], found["num_chunks"]) == (0.5, 1)
    assert found["log_diversity"] == 20  # the only sample of 50 words
    assert found["self_bleu"] == text_statistics.statistics(answers[::2])["self_bleu"]
