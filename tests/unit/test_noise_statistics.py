"""Law 2: the draws are uniform and independent, as their counters move.

Over 2.5 x 10^7 of them; NEFTUNE_DIST_NOISE_REPEATS=4 draws 10^8, in four times the minute.
"""

from __future__ import annotations

import itertools
import math
import os

import torch
from torch import Tensor

from neftune_dist.noise.law import RankStream
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.op import add_noise

TOKENS, HIDDEN = 2048, 1024
RANKS = STEPS = int(os.environ.get("NEFTUNE_DIST_NOISE_REPEATS", "2"))
MICRO_STEPS = 3
BINS = 1 << 16


def noise(rank: int, step: int, micro_step: int) -> Tensor:
    """u of one forward pass, as the operator adds it (alpha = sqrt(L d))."""
    x = torch.zeros(TOKENS, HIDDEN)
    layout = TokenLayout.from_lengths(torch.tensor([TOKENS]))
    stream = RankStream(11, rank, step, micro_step)
    alpha = torch.tensor(math.sqrt(TOKENS * HIDDEN), dtype=torch.float64)
    add_noise(x, layout, stream, alpha)
    return x


def test_millions_of_draws_are_uniform_and_uncorrelated() -> None:
    counts = torch.zeros(BINS, dtype=torch.int64)
    total = squares = 0.0
    products = dict.fromkeys(["token", "channel", "rank", "step", "micro-step"], 0.0)
    numbers = dict.fromkeys(products, 0)
    before: dict[tuple[str, int, int], Tensor] = {}

    def correlate(name: str, a: Tensor, b: Tensor) -> None:
        products[name] += float((a * b).sum(dtype=torch.float64))
        numbers[name] += a.numel()

    for step, rank, micro_step in itertools.product(range(STEPS), range(RANKS), range(MICRO_STEPS)):
        u = noise(rank, step, micro_step)
        counts += torch.bincount(((u.double() + 1) * (BINS / 2)).long().flatten(), minlength=BINS)
        total += float(u.sum(dtype=torch.float64))
        squares += float(u.square().sum(dtype=torch.float64))
        correlate("token", u[1:], u[:-1])
        correlate("channel", u[:, 1:], u[:, :-1])
        neighbours = {
            "rank": ("rank", step, micro_step),
            "step": ("step", rank, micro_step),
            "micro-step": ("micro-step", step, rank),
        }
        for name, key in neighbours.items():
            if key in before:
                correlate(name, u, before[key])
            before[key] = u
    number = int(counts.sum())
    assert number == STEPS * RANKS * MICRO_STEPS * TOKENS * HIDDEN >= 2.5e7
    share = counts.cumsum(0) / number
    expected = torch.arange(1, BINS + 1, dtype=torch.float64) / BINS
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded by chance once in 1,000 draws.
    assert float((share - expected).abs().max()) < 1.95 / math.sqrt(number)
    chi_squared = float((counts - number / BINS).square().sum() / (number / BINS))
    assert abs(chi_squared - (BINS - 1)) < 4 * math.sqrt(2 * (BINS - 1))
    # 4 standard deviations: of u 1 / sqrt(3), of u^2 sqrt(4 / 45), of a product of two 1 / 3.
    assert abs(total / number) < 4 * math.sqrt(1 / 3 / number)
    assert abs(squares / number - 1 / 3) < 4 * math.sqrt(4 / 45 / number)
    for name, product in products.items():
        assert abs(product / numbers[name]) < 4 / 3 / math.sqrt(numbers[name]), name


def test_ranks_that_share_a_data_parallel_rank_have_equal_noise() -> None:
    assert torch.equal(noise(1, 0, 0), noise(1, 0, 0))
    assert float((noise(1, 0, 0) == noise(2, 0, 0)).float().mean()) < 1e-4
