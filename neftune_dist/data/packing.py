"""Pack a step's documents into micro-batches and assign these to ranks.

The assignment decides speed, never the gradient. It is a pure function of the documents' lengths,
so every rank computes the same one and nothing is sent: 16,384 documents over 4,096 ranks take
0.1 s of a thread, while the step before is trained. All ranks run the same number of
micro-batches, because collectives go in step; a rank without a document left runs an empty one.

A round is the micro-batches that all ranks run at the same time; it lasts as long as the slowest of
them. The micro-batches of a round are therefore balanced by tokens (all work but attention) and by
squared lengths (attention).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from neftune_dist.config import UserError

# rounds[k][r]: positions within the step's documents that rank r takes in its micro-batch k.
Rounds = tuple[tuple[tuple[int, ...], ...], ...]

# Packed rounds are balanced by exchanging documents, under a large weight of the squares, then a
# small one (tokens have 1): short documents hardly change the squares, and can still balance the
# tokens. The limit is a number: a limit of time would differ from rank to rank.
_SQUARES_WEIGHTS, _MOST_EXCHANGES = (4.0, 0.25), 30
_MOST_QUIET = 8  # consecutive exchanges without a gain
_LEAST_GAIN = 1e-7
_CANDIDATES = 24  # places of a micro-batch that one exchange considers
# Relative imbalance at which the search stops: of tokens, which are most of the work, and squares.
_TOKENS_TOLERANCE, _SQUARES_TOLERANCE = 0.005, 0.01


def assign_documents(
    lengths: np.ndarray,
    world_size: int,
    micro_batch_tokens: int,
    packing: bool,
    quadratic_tokens: float,
) -> Rounds:
    """Assign documents to the micro-batches of all ranks.

    Args:
        lengths: int64 (num_documents,), tokens.
        world_size: ranks that do not share documents.
        micro_batch_tokens: the most tokens of a micro-batch.
        packing: a micro-batch computes its tokens; otherwise its rows times its longest row.
        quadratic_tokens: length at which a document's attention costs as much as all else; the
            work of a document of L tokens is L (1 + L / quadratic_tokens).

    Returns:
        rounds[k][r]: the documents, as positions in `lengths`, of micro-batch k of rank r.

    Raises:
        UserError: a document is longer than micro_batch_tokens.
    """
    if (longest := lengths.max(initial=0)) > micro_batch_tokens:
        raise UserError(
            f"A document of {longest} tokens does not fit into train.micro_batch_tokens="
            f"{micro_batch_tokens}, and a document is never split: raise it."
        )
    work = lengths * (1 + lengths / quadratic_tokens)
    by_length = np.argsort(-lengths, kind="stable")  # the longest first
    bins: np.ndarray  # int64 (num_documents,), the micro-batch: round * world_size + rank
    costs: np.ndarray
    if packing:
        bins, num_bins = _pack(lengths, work, by_length, world_size, micro_batch_tokens)
        order = np.arange(len(lengths))  # of the documents of a micro-batch: that of the step
        # Rounds of similar squares: long documents run beside long documents.
        squares = np.bincount(bins, lengths**2, num_bins)
        bins = _ranked(squares, bins, order)[bins]
        bins = _balance(lengths, bins, num_bins // world_size, world_size, micro_batch_tokens)
        costs = np.bincount(bins, work, num_bins)
    else:
        bins, num_bins = _pad(lengths[by_length], by_length, world_size, micro_batch_tokens)
        order = by_length
        costs = np.zeros(num_bins)  # every row costs as much as the longest
        np.maximum.at(costs, bins, work)
        costs *= np.bincount(bins, minlength=num_bins)
        place = _ranked(costs, bins, order)
        bins, costs = place[bins], costs[np.argsort(place)]
    bins = _assign_ranks(costs, bins, order, world_size)[bins]
    documents = order[np.argsort(bins[order], kind="stable")].tolist()
    ends = np.cumsum(np.bincount(bins, minlength=num_bins)).tolist()
    groups = [tuple(documents[i:j]) for i, j in pairwise([0, *ends])]
    return tuple(tuple(groups[k : k + world_size]) for k in range(0, num_bins, world_size))


def _ranked(costs: np.ndarray, bins: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The place of every bin, int64 (num_bins,): the heaviest first, equal ones by their first
    document in `order`."""
    first = np.full(len(costs), -1)
    first[bins[order[::-1]]] = order[::-1]  # of equal indices the last one counts
    place = np.empty(len(costs), np.int64)
    place[np.lexsort((first, -costs))] = np.arange(len(costs))
    return place


def _assign_ranks(
    costs: np.ndarray, bins: np.ndarray, order: np.ndarray, world_size: int
) -> np.ndarray:
    """The bins renumbered, int64 (num_bins,): within a round the heaviest goes to the rank with the
    least work so far."""
    place = _ranked(costs, bins, order).reshape(-1, world_size)
    load = np.zeros(world_size)
    rank = np.empty_like(place)
    for own, cost, given in zip(place, costs.reshape(-1, world_size), rank, strict=True):
        heaviest = np.argsort(own)
        given[heaviest] = np.argsort(load, kind="stable")
        load[given] += cost
    return (rank + np.arange(len(rank))[:, None] * world_size).ravel()


def _pack(
    lengths: np.ndarray,
    work: np.ndarray,
    by_length: np.ndarray,
    world_size: int,
    capacity: int,
) -> tuple[np.ndarray, int]:
    """Bins for as few rounds as possible, and their number. The bins of `_fill` are balanced but
    need more room than those of `_fit`, which are used only where that saves a round."""
    sizes, costs = lengths[by_length].tolist(), work[by_length].tolist()
    num_rounds = max(1, -(-sum(sizes) // (world_size * capacity)))
    found = _fill(sizes, costs, num_rounds * world_size, capacity)
    if found is None:
        fitted = _fit(sizes, capacity)
        enough = -(-(max(fitted) + 1) // world_size)
        while found is None and num_rounds < enough:
            num_rounds += 1
            found = _fill(sizes, costs, num_rounds * world_size, capacity)
        found = found or fitted
    bins = np.empty(len(lengths), np.int64)
    bins[by_length] = found
    return bins, num_rounds * world_size


def _fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """Best fit decreasing (Johnson 1973): the longest remaining document goes where it leaves the
    least room. The bin of every document."""
    num_bins, bins = 0, []
    room: list[tuple[int, int]] = []  # tokens left, bin; in order
    for size in sizes:
        place = bisect_left(room, (size, 0))
        if place < len(room):
            left, b = room.pop(place)
        else:
            left, b = capacity, num_bins
            num_bins += 1
        bins.append(b)
        insort(room, (left - size, b))
    return bins


def _fill(
    sizes: Sequence[int], costs: Sequence[float], num_bins: int, capacity: int
) -> list[int] | None:
    """Longest processing time first (Graham 1969) under a capacity: the longest remaining document
    goes to the bin with the least work that has room. The bin of every document; None where no bin
    has room."""
    bins = list(range(min(num_bins, len(sizes))))  # the first ones go to empty bins
    heap = [(costs[b], b, sizes[b]) for b in bins]  # work, bin, tokens
    heap += [(0.0, b, 0) for b in range(len(bins), num_bins)]
    heapq.heapify(heap)
    for size, cost in zip(sizes[num_bins:], costs[num_bins:], strict=True):
        full = []
        while heap and heap[0][2] + size > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        done, b, tokens = heap[0]
        heapq.heapreplace(heap, (done + cost, b, tokens + size))
        bins.append(b)
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _balance(
    lengths: np.ndarray, bins: np.ndarray, num_rounds: int, world_size: int, capacity: int
) -> np.ndarray:
    """The bins after exchanges of documents within every round."""
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


def _pad(
    sizes: np.ndarray, by_length: np.ndarray, world_size: int, capacity: int
) -> tuple[np.ndarray, int]:
    """Rows of similar length together, the longest first, so that little is padded: in as few
    rounds as the capacity allows, and then with the smallest capacity that needs no more.

    Args:
        sizes: tokens, in the order of `by_length`.
        by_length: the documents, the longest first.
        world_size, capacity: as `assign_documents` takes them.

    Returns:
        The bin of every document, and the number of bins.
    """
    tokens = sizes.tolist()

    def begins(capacity: int) -> list[int]:
        """Where every bin begins in `sizes`."""
        found, place = [], 0
        while place < len(tokens):
            found.append(place)
            place += capacity // tokens[place]
        return found

    num_bins = world_size * max(1, -(-len(begins(capacity)) // world_size))
    least = max(tokens, default=0)
    # A larger capacity never needs more bins.
    enough = bisect_left(
        range(least, capacity), True, key=lambda smaller: len(begins(smaller)) <= num_bins
    )
    bins = np.empty(len(tokens), np.int64)
    is_first = np.zeros(len(tokens), np.int64)
    is_first[begins(least + enough)] = 1
    bins[by_length] = np.cumsum(is_first) - 1
    return bins, num_bins
