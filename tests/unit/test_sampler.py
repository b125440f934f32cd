"""Law 4: which documents form a step, as a pure function of (fingerprint, seed, step)."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from neftune_dist.config import TrainConfig, UserError
from neftune_dist.data.sampler import ORDER, Sampler, make_sampler


def sampler(num_documents: int = 100, fingerprint: str = "data", **train: object) -> Sampler:
    return make_sampler(TrainConfig(**train), num_documents, fingerprint)  # type: ignore[arg-type]


def all_steps(made: Sampler) -> tuple[np.ndarray, np.ndarray]:
    parts = [made.documents(step) for step in range(made.num_steps)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def test_the_order_never_changes_silently() -> None:
    """Golden: where this changes, so must `ORDER`, and no run of the past can be resumed."""
    assert ORDER == "feistel-1"
    made = sampler(20, "neftune", global_batch_size=8, num_epochs=2, seed=0)
    assert [made.documents(step)[0].tolist() for step in range(5)] == [
        [13, 19, 1, 18, 5, 10, 16, 2],
        [17, 0, 14, 9, 7, 4, 15, 6],
        [11, 3, 12, 8],
        [4, 6, 9, 5, 8, 17, 18, 12],
        [15, 7, 11, 2, 10, 19, 3, 0],
    ]
    large = sampler(1_000_003, "neftune", global_batch_size=8, max_steps=3, seed=2**63 - 1)
    assert large.documents(2)[0].tolist() == [
        52332,
        126025,
        758242,
        435108,
        909795,
        486152,
        167341,
        643118,
    ]


def permuted(index: int, num_documents: int, key: str) -> int:
    """The order in plain integers, from the two papers."""
    mask = 2**64 - 1

    def splitmix64(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    gamma, start = 0x9E3779B97F4A7C15, hashlib.sha256(key.encode()).digest()[:8]
    keys = [splitmix64(int.from_bytes(start, "little") + k * gamma & mask) for k in range(12)]
    left = math.ceil(math.sqrt(num_documents))
    right = math.ceil(num_documents / left)
    while True:
        a, b = divmod(index, right)
        for k in range(0, 12, 2):
            a = (a + splitmix64(keys[k] + b * gamma & mask)) % left
            b = (b + splitmix64(keys[k + 1] + a * gamma & mask)) % right
        index = a * right + b
        if index < num_documents:
            return index


@pytest.mark.parametrize("num_documents", [1, 2, 3, 50, 101, 4097, 10**8])
def test_the_order_is_that_of_plain_integers(num_documents: int) -> None:
    """No library's overflow decides it."""
    batch = min(50, num_documents)
    made = sampler(num_documents, "f", global_batch_size=batch, max_steps=1, seed=7)
    expected = [permuted(i, num_documents, "f/7/0") for i in range(batch)]
    assert made.documents(0)[0].tolist() == expected


@pytest.mark.parametrize("num_documents", [*range(1, 70), 127, 1000, 1023, 1024, 1025, 99_991])
def test_an_epoch_is_a_permutation(num_documents: int) -> None:
    made = sampler(num_documents, global_batch_size=num_documents, num_epochs=2)
    for step in range(2):
        assert sorted(made.documents(step)[0].tolist()) == list(range(num_documents))


def test_all_orders_of_few_documents_are_equally_frequent() -> None:
    """Chi-squared over the 120 orders of 5 documents."""
    counts = Counter(
        tuple(sampler(5, global_batch_size=5, seed=seed).documents(0)[0].tolist())
        for seed in range(4800)
    )
    assert len(counts) == 120
    # 119 degrees of freedom: mean 119, standard deviation 15.4.
    assert sum((count - 40) ** 2 / 40 for count in counts.values()) < 181


@pytest.mark.parametrize("num_documents", [7, 64, 1000])
def test_every_document_is_equally_frequent_at_every_place(num_documents: int) -> None:
    places = min(num_documents, 16)
    counts = np.zeros((places, num_documents))
    num_seeds = 40 * num_documents if num_documents < 100 else 2 * num_documents
    for seed in range(num_seeds):
        made = sampler(num_documents, global_batch_size=places, seed=seed)
        counts[np.arange(places), made.documents(0)[0]] += 1
    expected, degrees = num_seeds / num_documents, places * (num_documents - 1)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_neighbours_are_independent() -> None:
    """Successive places, and successive documents, show no correlation over an epoch."""
    number = 100_003
    order = sampler(number, global_batch_size=number).documents(0)[0]
    for values in (order, np.argsort(order)):
        correlation = np.corrcoef(values[:-1], values[1:])[0, 1]
        assert abs(correlation) < 4 / number**0.5


def test_a_step_takes_no_memory_that_grows_with_the_documents() -> None:
    made = sampler(10**12, global_batch_size=128, max_steps=10**6)
    tracemalloc.start()
    indices = made.documents(999_999)[0]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(indices)) == 128 and indices.max() < 10**12
    assert peak < 2**17


@pytest.mark.parametrize("epochs", [1, 2, 3.0])
def test_every_document_once_an_epoch(epochs: float) -> None:
    made = sampler(101, global_batch_size=16, num_epochs=epochs)
    indices, of_epoch = all_steps(made)
    for epoch in range(int(epochs)):
        assert sorted(indices[of_epoch == epoch]) == list(range(101))
    assert len(indices) == made.total_documents == 101 * epochs


def test_an_epoch_s_last_step_takes_what_is_left() -> None:
    made = sampler(100, global_batch_size=48, num_epochs=2)
    sizes = [len(made.documents(step)[0]) for step in range(made.num_steps)]
    assert sizes == [48, 48, 4, 48, 48, 4]


@pytest.mark.parametrize(
    ("epochs", "documents", "steps"),
    [(0.5, 64, 4), (1.55, 164, 11), (1e-9, 16, 1), (0.16, 16, 1), (0.17, 32, 2), (0.98, 100, 7)],
)
def test_fractional_epochs_are_rounded_up_to_whole_steps(
    epochs: float, documents: int, steps: int
) -> None:
    made = sampler(100, global_batch_size=16, num_epochs=epochs)
    indices, _ = all_steps(made)
    assert (len(indices), made.num_steps, made.total_documents) == (documents, steps, documents)
    most, fewest = max(Counter(indices.tolist()).values()), int(epochs)
    assert most <= fewest + 1


def test_0_29_epochs_of_100_documents_are_29() -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert sampler(100, global_batch_size=1, num_epochs=0.29).num_steps == 29


@pytest.mark.parametrize("documents", [32, 33, 63, 64, 100])
@pytest.mark.parametrize(("short", "long"), [(1, 2), (2, 3), (0.3, 1), (1.5, 2.5)])
def test_an_extended_run_trains_what_a_long_one_does(
    documents: int, short: float, long: float
) -> None:
    """Law 4: the documents of a step do not depend on how long the run is."""
    first, whole = (
        sampler(documents, global_batch_size=32, num_epochs=epochs) for epochs in (short, long)
    )
    by_steps = sampler(documents, global_batch_size=32, max_steps=whole.num_steps)
    for step in range(first.num_steps):
        for one, other in zip(first.documents(step), whole.documents(step), strict=True):
            np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(all_steps(whole), all_steps(by_steps))
    extended = Counter(
        index
        for made, steps in (
            (first, range(first.num_steps)),
            (whole, range(first.num_steps, whole.num_steps)),
        )
        for step in steps
        for index in made.documents(step)[0].tolist()
    )
    assert extended == Counter(all_steps(whole)[0].tolist())
    if long == int(long):
        assert set(extended.values()) == {int(long)}


def test_the_paper_s_epochs_are_the_default() -> None:
    assert sampler(100, global_batch_size=10).total_documents == 300


def test_max_steps_runs_over_as_many_epochs_as_it_takes() -> None:
    made = sampler(10, global_batch_size=7, max_steps=1000)
    assert (made.num_steps, made.total_documents) == (1000, 5000)
    indices, epochs = made.documents(999)
    assert len(indices) == 3 and epochs.tolist() == [499] * 3


def test_a_pure_function_of_fingerprint_seed_and_step() -> None:
    """No earlier call, no other step and no other process changes what a step holds."""
    made = sampler(1000, global_batch_size=32, num_epochs=2, seed=3)
    forwards = [made.documents(step)[0].tolist() for step in range(made.num_steps)]
    again = sampler(1000, global_batch_size=32, num_epochs=2, seed=3)
    backwards = [again.documents(step)[0].tolist() for step in reversed(range(made.num_steps))]
    assert forwards == backwards[::-1]
    program = (
        "from neftune_dist.config import TrainConfig; "
        "from neftune_dist.data.sampler import make_sampler; "
        "s = make_sampler(TrainConfig(global_batch_size=32, num_epochs=2, seed=3), 1000, 'data');"
        "print(s.documents(40)[0].tolist())"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == str(forwards[40])


def test_callers_may_change_the_indices_that_they_get() -> None:
    base = sampler(100, global_batch_size=10)
    first = base.documents(0)[0].copy()
    base.documents(0)[0][:] = 0
    assert base.documents(0)[0].tolist() == first.tolist()


@pytest.mark.parametrize("epochs", [1e-6, 0.001])
def test_a_run_has_at_least_one_step(epochs: float) -> None:
    assert sampler(100, global_batch_size=10, num_epochs=epochs).num_steps == 1


@pytest.mark.parametrize(("steps", "documents"), [(1, 10), (10, 95), (11, 105), (20, 190)])
def test_total_documents_of_short_last_steps(steps: int, documents: int) -> None:
    found = sampler(95, global_batch_size=10, max_steps=steps)
    assert found.total_documents == documents
    assert sum(len(found.documents(step)[0]) for step in range(steps)) == documents


def test_seed_fingerprint_and_epoch_each_give_another_order() -> None:
    base = sampler(1000, global_batch_size=1000, num_epochs=2)
    others = [
        base.documents(1)[0],
        sampler(1000, global_batch_size=1000, seed=1).documents(0)[0],
        sampler(1000, "other", global_batch_size=1000).documents(0)[0],
        np.arange(1000),
    ]
    for other in others:
        # Of two independent orders of 1000, about one place agrees.
        assert (base.documents(0)[0] == other).sum() < 10


def test_the_order_does_not_favour_early_rows() -> None:
    """Over many seeds each row stands in the first step as often as any other (chi-squared)."""
    counts = np.zeros(64)
    for seed in range(500):
        counts[sampler(64, global_batch_size=16, seed=seed).documents(0)[0]] += 1
    expected = 500 * 16 / 64
    # 63 degrees of freedom; drawn without replacement, the sum is about (1 - 1/4) of chi-squared.
    assert 20 < ((counts - expected) ** 2 / expected).sum() < 100


def test_batch_size_cuts_one_sequence() -> None:
    """Another batch size trains on the same documents in the same order."""
    one = all_steps(sampler(100, global_batch_size=10, num_epochs=2))
    two = all_steps(sampler(100, global_batch_size=33, num_epochs=2))
    np.testing.assert_array_equal(one, two)


def test_fewer_documents_than_a_batch() -> None:
    assert sampler(128).num_steps == 3
    with pytest.raises(UserError, match=r"127 documents.*train\.global_batch_size=128"):
        sampler(127)
