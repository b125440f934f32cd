"""The split of documents and samples of them, on hand-made columns."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from neftune_dist.config import DataConfig, SourceConfig
from neftune_dist.data.documents import STATS
from neftune_dist.data.split import Split, sample, split_documents

MANY = 4000


def stats_of(number: int, source: Any = 0, content: Any = None, prompt: Any = None) -> np.ndarray:
    """Documents of one token with random digests, or those given."""
    random = np.random.default_rng(7)
    digests = random.integers(0, 2**64, (2, number), np.uint64)
    stats = np.ones(number, STATS)
    stats["source"] = source
    stats["content"] = digests[0] if content is None else content
    stats["prompt"] = digests[1] if prompt is None else prompt
    return stats


def split(stats: np.ndarray, *sources: SourceConfig, **data: Any) -> Split:
    return split_documents(stats, DataConfig(**data), sources or [SourceConfig("a.json")])


def test_a_held_out_share_is_rounded() -> None:
    """0.29 of 100 is 28.999999999999996."""
    found = split(stats_of(100), held_out_fraction=0.29)
    assert (len(found.held_out), len(found.train)) == (29, 71)


@pytest.mark.parametrize("number", [1, 30, 99])
def test_different_prompts_are_held_out_to_the_number(number: int) -> None:
    found = split(stats_of(100), num_held_out=number)
    assert (len(found.held_out), len(found.train)) == (number, 100 - number)
    assert sorted([*found.held_out, *found.train]) == list(range(100))


def test_documents_of_a_prompt_are_held_out_together() -> None:
    prompts = np.repeat(np.random.default_rng(1).integers(0, 2**64, 25, np.uint64), 4)
    found = split(stats_of(100, prompt=prompts), num_held_out=10)
    assert len(found.held_out) == 12
    assert not np.isin(prompts[found.train], prompts[found.held_out]).any()


def test_capped_documents_keep_their_order() -> None:
    found = split(stats_of(MANY), SourceConfig("a.json", max_documents=500))
    assert len(found.train) == 500 and (np.diff(found.train) > 0).all()
    assert len(found.not_chosen) == MANY - 500


def test_a_cap_and_a_fractional_weight_choose_independently() -> None:
    """Half of the capped documents occur twice, not the half with the smaller digests."""
    cap = MANY // 2
    found = split(stats_of(MANY), SourceConfig("a.json", max_documents=cap, weight=1.5))
    assert abs(len(found.train) - 1.5 * cap) < 4 * (cap / 4) ** 0.5


def test_a_sample_is_independent_of_a_fractional_weight() -> None:
    stats = stats_of(MANY)
    chosen = np.unique(split(stats, SourceConfig("a.json", weight=0.5)).train)
    sampled = sample(stats["content"], MANY // 2, lambda i: i)
    both = len(np.intersect1d(chosen, sampled))
    assert abs(both - MANY / 4) < 4 * (MANY * 3 / 16) ** 0.5


def test_copies_in_the_held_out_source_are_no_duplicates_to_train_on() -> None:
    content = [1, 2, 3, 3, 1, 1]
    prompt = [10, 20, 30, 30, 40, 40]
    stats = stats_of(6, [0, 0, 0, 0, 1, 1], content, prompt)
    for duplicates in ("keep", "drop"):
        found = split(stats, held_out_source="b.json", duplicates=duplicates)
        assert found.repeated.tolist() == [3] and found.held_out.tolist() == [4, 5]
        assert found.train.tolist() == ([0, 1, 2] if duplicates == "drop" else [0, 1, 2, 3])


def test_every_document_is_counted_once() -> None:
    stats = stats_of(9, [0, 0, 0, 0, 0, 0, 0, 1, 1], range(9), [5, 6, 7, 1, 2, 3, 4, 5, 6])
    found = split(stats, SourceConfig("a.json", max_documents=2), held_out_source="b.json")
    counts = (len(found.repeated), len(found.leaked), len(found.not_chosen))
    assert counts == (0, 2, 3)
    assert len(np.unique(found.train)) + len(found.held_out) + sum(counts) == 9


def test_a_sample_has_one_index_of_a_key_and_grows() -> None:
    digests = stats_of(60)["content"]
    samples = [sample(digests, number, lambda i: i // 3) for number in (5, 12, 100)]
    assert [len(chosen) for chosen in samples] == [5, 12, 20]
    for small, large in itertools.pairwise(samples):
        assert np.isin(small, large).all()
    assert sample(digests, 60, lambda i: i if i < 4 else None).tolist() == [0, 1, 2, 3]
