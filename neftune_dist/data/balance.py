"""Balance the micro-batches of a round by exchanging documents between pairs of them.

A bin is a micro-batch of one rank. The search is a pure function of lengths and bins, vectorised
over all pairs of all rounds.
"""

from __future__ import annotations

import numpy as np

# Packed rounds are balanced by exchanging documents, under a large weight of the squares, then a
# small one (tokens have 1): short documents hardly change the squares, and can still balance the
# tokens. The limit is a number: a limit of time would differ from rank to rank.
_SQUARES_WEIGHTS, _MOST_EXCHANGES = (4.0, 0.25), 30
_MOST_QUIET = 8  # consecutive exchanges without a gain
_LEAST_GAIN = 1e-7
_CANDIDATES = 24  # places of a micro-batch that one exchange considers
# Relative imbalance at which the search stops: of tokens, which are most of the work, and squares.
_TOKENS_TOLERANCE, _SQUARES_TOLERANCE = 0.005, 0.01


def balance(
    lengths: np.ndarray, bins: np.ndarray, num_rounds: int, world_size: int, capacity: int
) -> np.ndarray:
    """The bins after exchanges of documents between those of one round.

    Args:
        lengths: int64 (num_documents,), tokens.
        bins: int64 (num_documents,), round * world_size + rank.
        num_rounds, world_size: there are num_rounds * world_size bins.
        capacity: the most tokens of a bin.
    """
    if world_size == 1 or len(lengths) == 0:
        return bins
    held, size = _as_arrays(lengths, bins, num_rounds * world_size)
    rounds = size.reshape(len(size), num_rounds, world_size)
    mean = rounds.sum((0, 2)) / world_size
    least = [_least_squares(row[row > 0], world_size) for row in rounds.swapaxes(0, 1)]
    # Tokens or squares, of the round of every bin: (2, bins).
    scale = np.repeat(np.stack([mean, np.array(least)]), world_size, axis=1)
    # Sums of whole numbers, exact in any order: all machines find the same rounds.
    sums = np.stack([size.sum(0), (size * size).sum(0)])
    for weight in _SQUARES_WEIGHTS:
        quiet = 0
        for number in range(_MOST_EXCHANGES):
            totals = sums / scale
            tokens, squares = totals.reshape(2, num_rounds, world_size)
            balanced = (
                abs(tokens - 1).max() < _TOKENS_TOLERANCE and squares.max() < 1 + _SQUARES_TOLERANCE
            )
            if balanced or quiet == _MOST_QUIET:
                break
            begins = np.arange(num_rounds)[:, None] * world_size
            a, b = ((begins + ranks).ravel() for ranks in _pairs(tokens, squares, number))
            places = _places(len(size), number)
            swaps = _best_swaps(size, totals, scale, (a, b), places, capacity, weight)
            if swaps is None:
                quiet += 1
                continue
            quiet = 0
            one, other = swaps
            more = np.stack([size[other] - size[one], size[other] ** 2 - size[one] ** 2])
            sums[:, one[1]] += more
            sums[:, other[1]] -= more
            for array in (held, size):
                array[one], array[other] = array[other], array[one]
    place, balanced_bins = np.nonzero(held < len(lengths))
    return balanced_bins[np.argsort(held[place, balanced_bins])]


Where = tuple[np.ndarray, np.ndarray]  # places, bins


def _best_swaps(
    size: np.ndarray,
    totals: np.ndarray,
    scale: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    places: np.ndarray,
    capacity: int,
    weight: float,
) -> tuple[Where, Where] | None:
    """The best swap of every pair of bins, as two places; None where no swap gains.

    The objective, summed over bins: the squared distance of the tokens from their mean, plus
    `weight` times the squared excess of the squares over `_least_squares`. A swap with a free place
    is a move.

    Args:
        size: tokens of every place, (places, bins).
        totals: tokens and squares of every bin relative to `scale`, (2, bins).
        scale: the mean tokens and the least squares of the bin's round, (2, bins).
        pairs: the bins that exchange, (pairs,) twice.
        places: the places considered.
        capacity: the most tokens of a bin.
        weight: of the squares.
    """

    def uneven(totals: np.ndarray) -> np.ndarray:
        excess = np.maximum(totals[1] - (1 + _SQUARES_TOLERANCE), 0)
        return np.asarray((totals[0] - 1) ** 2 + weight * excess**2)

    a, b = pairs
    old_a, old_b, scale = totals[:, a], totals[:, b], scale[:, a]
    old = uneven(old_a) + uneven(old_b)
    # Tokens alone rule out most swaps: a share s of the mean that moves from b to a gains at most
    # 2 s (b - a - s) by tokens and, where no excess is left, the whole penalty by squares.
    gap = old_b[0] - old_a[0]
    penalty = old - (old_a[0] - 1) ** 2 - (old_b[0] - 1) ** 2
    reach = np.sqrt(np.maximum(gap**2 + 2 * penalty - _LEAST_GAIN, 0))
    considered = size[places]
    is_free = considered == 0  # one free place is as good as another
    considered[is_free & (is_free.cumsum(0) > 1)] = np.nan
    given, taken = considered[:, a], considered[:, b]  # (places, pairs)
    low, high = (given + scale[0] * (gap + side) / 2 for side in (-reach, reach))
    # (places of a, places of b, pairs)
    found = np.flatnonzero((taken > low[:, None]) & (taken < high[:, None]))
    i, found = np.divmod(found, taken.size)
    j, pair = np.divmod(found, len(a))
    given, taken = given[i, pair], taken[j, pair]
    shift = np.stack([taken - given, taken * taken - given * given]) / scale[:, pair]
    new_a, new_b = old_a[:, pair] + shift, old_b[:, pair] - shift
    gains = old[pair] - uneven(new_a) - uneven(new_b)
    # A full micro-batch is exactly full: rounding must not count as overfull.
    room = capacity / scale[0, pair] * (1 + 1e-9)
    gaining = np.flatnonzero((np.maximum(new_a[0], new_b[0]) <= room) & (gains > _LEAST_GAIN))
    if len(gaining) == 0:
        return None
    # The best of every pair, the first of equal ones.
    ordered = gaining[np.lexsort((-gains[gaining], pair[gaining]))]
    best = ordered[np.diff(pair[ordered], prepend=-1) > 0]
    return (places[i[best]], a[pair[best]]), (places[j[best]], b[pair[best]])


def _as_arrays(
    lengths: np.ndarray, bins: np.ndarray, num_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Documents and their lengths, (places, bins). Every bin has some free places, which hold
    num_documents and length 0."""
    counts = np.bincount(bins, minlength=num_bins)
    order = np.argsort(bins, kind="stable")
    place = np.arange(len(bins)) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.full((counts.max() + 2, num_bins), len(lengths))
    held[place, bins[order]] = order
    return held, np.append(lengths, 0).astype(np.float64)[held]


def _least_squares(lengths: np.ndarray, world_size: int) -> float:
    """A lower bound of the largest sum of squares in a round of equal tokens: the mean, or that of
    the longest document with the shortest ones that fill its micro-batch up."""
    *others, longest = np.sort(lengths).tolist()
    fill = np.searchsorted(np.cumsum(others), lengths.sum() / world_size - longest, side="right")
    alone = float(longest**2 + sum(n * n for n in others[:fill]))
    return max(float((lengths * lengths).sum()) / world_size, alone)


def _pairs(tokens: np.ndarray, squares: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The ranks of the heavier and of the lighter half that exchange, (rounds, pairs) twice. The
    measure of heaviness, and the partners, change with the number of the exchange."""
    measures = (tokens, squares, tokens + squares / 2, tokens - squares / 2)
    order = np.argsort(-measures[number % 4], axis=1, kind="stable")
    num_pairs = tokens.shape[1] // 2
    heavy, light = order[:, :num_pairs], order[:, ::-1][:, :num_pairs]
    return heavy, np.roll(light, number // 4, axis=1)


def _places(num_places: int, number: int) -> np.ndarray:
    """The places that an exchange considers: all, or a changing selection with a free one."""
    if num_places <= _CANDIDATES:
        return np.arange(num_places)
    spread = np.arange(_CANDIDATES - 1) * num_places // (_CANDIDATES - 1)
    return np.append((spread + number) % num_places, num_places - 1)
