"""Pack a step's documents into micro-batches and assign these to ranks.

The assignment decides speed, never the gradient. It is a pure function of the documents' lengths,
so every rank computes the same one and nothing is sent. All ranks run the same number of
micro-batches, because collectives go in step; a rank without a document left runs an empty one.

A round is the micro-batches that all ranks run at the same time: it lasts as long as the slowest of
them. So those of a round are made alike, in tokens (all but attention) and in squared lengths
(attention) each by itself.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from neftune_dist.config import UserError

Groups = list[tuple[int, ...]]
# rounds[k][r]: positions within the step's documents that rank r takes in its micro-batch k.
Rounds = tuple[tuple[tuple[int, ...], ...], ...]

# Exchanges of documents that even out packed rounds, under two weights of the squares one after the
# other (tokens have 1). The squares first: short documents hardly change them, and can still even
# out the tokens. Limited by number: a limit of time would end them elsewhere on every rank.
_SQUARES_WEIGHTS, _MOST_EXCHANGES = (4.0, 0.25), 30
_MOST_QUIET = 8  # exchanges in a row that gain nothing
_LEAST_GAIN = 1e-7
_CANDIDATES = 24  # places of a micro-batch that one exchange looks at
# Relative distances that are even enough: of tokens, which are most of the work, and of squares.
_TOKENS_NEAR, _SQUARES_NEAR = 0.005, 0.01


def assign_documents(
    lengths: np.ndarray,
    world_size: int,
    micro_batch_tokens: int,
    packing: bool,
    quadratic_tokens: float,
) -> Rounds:
    """Deal documents to world_size ranks, at most micro_batch_tokens a micro-batch.

    Args:
        lengths: int64 (num_documents,), tokens.
        packing: a micro-batch costs its tokens; otherwise its rows times its longest row.
        quadratic_tokens: length at which a document's attention costs as much as all else; the
            work of a document of L tokens is L (1 + L / quadratic_tokens).

    Raises:
        UserError: a document is longer than micro_batch_tokens.
    """
    sizes = [int(n) for n in lengths]
    if sizes and max(sizes) > micro_batch_tokens:
        raise UserError(
            f"A document of {max(sizes)} tokens does not fit into train.micro_batch_tokens="
            f"{micro_batch_tokens}, and a document is never split: raise it."
        )

    def work(size: int) -> float:
        return size * (1 + size / quadratic_tokens)

    if packing:
        # Rounds of like squares: long documents run beside long documents.
        bins = _pack(sizes, world_size, micro_batch_tokens, work)
        rounds = _in_rounds(bins, [sum(sizes[i] ** 2 for i in group) for group in bins], world_size)
        rounds = _even_out(lengths, rounds, micro_batch_tokens)
    else:
        bins = _pad(sizes, world_size, micro_batch_tokens)
        rounds = _in_rounds(bins, [_padded(sizes, group, work) for group in bins], world_size)
    # Within a round the heaviest goes to the rank that has worked least so far.
    load = [0.0] * world_size
    groups = []
    for each in rounds:
        costs = [
            sum(work(sizes[i]) for i in group) if packing else _padded(sizes, group, work)
            for group in each
        ]
        heaviest = sorted(range(world_size), key=lambda b: (-costs[b], each[b]))
        ranks = sorted(range(world_size), key=lambda r: (load[r], r))
        dealt: Groups = [()] * world_size
        for rank, b in zip(ranks, heaviest, strict=True):
            dealt[rank] = each[b]
            load[rank] += costs[b]
        groups.append(tuple(dealt))
    return tuple(groups)


def _in_rounds(bins: Groups, costs: Sequence[float], world_size: int) -> list[Groups]:
    """Rounds of world_size bins that cost about the same, the heaviest first."""
    order = sorted(range(len(bins)), key=lambda b: (-costs[b], bins[b]))
    ordered = [bins[b] for b in order]
    return [ordered[first : first + world_size] for first in range(0, len(ordered), world_size)]


def _padded(sizes: Sequence[int], group: Sequence[int], work: Callable[[int], float]) -> float:
    """Work of padded rows: each costs what the longest does."""
    return len(group) * work(max((sizes[i] for i in group), default=0))


def _pack(
    sizes: Sequence[int], world_size: int, capacity: int, work: Callable[[int], float]
) -> Groups:
    """Bins for as few rounds as are found to do. Those of `_fill` are even but need more room than
    those of `_fit`, which are taken only where that saves a round."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    fitted = _fit(order, sizes, capacity)
    enough = max(1, -(-len(fitted) // world_size))
    for num_rounds in range(max(1, -(-sum(sizes) // (world_size * capacity))), enough + 1):
        bins = _fill(order, sizes, num_rounds * world_size, capacity, work)
        if bins is not None:
            break
    else:
        bins = fitted + [[] for _ in range(enough * world_size - len(fitted))]
    return [tuple(sorted(group)) for group in bins]  # in the order of the step


def _fit(order: Sequence[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best fit decreasing (Johnson 1973): the longest document left goes where it leaves the least
    room."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left, bin; in order
    for i in order:
        place = bisect_left(room, (sizes[i], 0))
        left, b = room.pop(place) if place < len(room) else (capacity, len(bins))
        if b == len(bins):
            bins.append([])
        bins[b].append(i)
        insort(room, (left - sizes[i], b))
    return bins


def _fill(
    order: Sequence[int],
    sizes: Sequence[int],
    num_bins: int,
    capacity: int,
    work: Callable[[int], float],
) -> list[list[int]] | None:
    """Longest processing time first (Graham 1969) under a capacity: the longest document left goes
    to the bin with the least work that has room; None where none has."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, b, 0) for b in range(num_bins)]  # work, bin, tokens
    for i in order:
        full = []
        while heap and heap[0][2] + sizes[i] > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        done, b, tokens = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (done + work(sizes[i]), b, tokens + sizes[i]))
        for each in full:
            heapq.heappush(heap, each)
    return bins


def _even_out(lengths: np.ndarray, rounds: list[Groups], capacity: int) -> list[Groups]:
    """The same rounds after exchanges of documents within each."""
    world_size = len(rounds[0])
    if world_size == 1 or len(lengths) == 0:
        return rounds
    held, size = _table(lengths, rounds)
    mean = size.sum((1, 2)) / world_size
    least = np.array([_least_squares(each[each > 0], world_size) for each in size])
    scale = np.stack([mean, least])[..., None]  # (tokens or squares, rounds, 1)
    for weight in _SQUARES_WEIGHTS:
        quiet = 0
        for number in range(_MOST_EXCHANGES):
            load = np.stack([size, size * size])  # (tokens or squares, rounds, ranks, places)
            # Sums of whole numbers, exact in any order: all machines find the same layout.
            totals = load.sum(3) / scale
            tokens, squares = totals
            even = abs(tokens - 1).max() < _TOKENS_NEAR and squares.max() < 1 + _SQUARES_NEAR
            if even or quiet == _MOST_QUIET:
                break
            pairs, places = _pairs(tokens, squares, number), _places(size.shape[2], number)
            swaps = _best_swaps(load, totals, scale, pairs, places, capacity / mean, weight)
            if swaps is None:
                quiet += 1
                continue
            quiet = 0
            one, other = swaps
            for table in (held, size):
                table[one], table[other] = table[other], table[one]
    return [
        [tuple(sorted(int(i) for i in group if i < len(lengths))) for group in each]
        for each in held
    ]


Where = tuple[np.ndarray, np.ndarray, np.ndarray]  # rounds, ranks, places


def _best_swaps(
    load: np.ndarray,
    totals: np.ndarray,
    scale: np.ndarray,
    pairs: tuple[np.ndarray, np.ndarray],
    places: np.ndarray,
    room: np.ndarray,
    weight: float,
) -> tuple[Where, Where] | None:
    """Of each pair of micro-batches that gains by it, the two places to swap; None where none does.

    What is to be lessened, summed over micro-batches: the squared distance of the tokens from their
    mean, and `weight` times the squared excess of the squares over `_least_squares`. A swap with a
    free place is a move.
    """

    def uneven(totals: np.ndarray) -> np.ndarray:
        excess = np.maximum(totals[1] - (1 + _SQUARES_NEAR), 0)
        return np.asarray((totals[0] - 1) ** 2 + weight * excess**2)

    a, b = pairs
    rows = np.arange(len(a))[:, None]
    # (tokens or squares, rounds, pairs, places of a, places of b)
    given = load[:, rows, a][..., places][..., :, None]
    taken = load[:, rows, b][..., places][..., None, :]
    shift = (taken - given) / scale[..., None, None]
    old_a, old_b = totals[:, rows, a][..., None, None], totals[:, rows, b][..., None, None]
    new_a, new_b = old_a + shift, old_b - shift
    gains = uneven(old_a) + uneven(old_b) - uneven(new_a) - uneven(new_b)
    # A full micro-batch is exactly full: what is left of rounding must not count.
    gains[np.maximum(new_a[0], new_b[0]) > room[:, None, None, None] * (1 + 1e-9)] = 0
    gains = gains.reshape(*a.shape, -1)
    best = gains.argmax(2)
    gaining = np.nonzero(np.take_along_axis(gains, best[..., None], 2)[..., 0] > _LEAST_GAIN)
    if len(gaining[0]) == 0:
        return None
    place_a, place_b = np.divmod(best[gaining], len(places))
    return (
        (gaining[0], a[gaining], places[place_a]),
        (gaining[0], b[gaining], places[place_b]),
    )


def _table(lengths: np.ndarray, rounds: list[Groups]) -> tuple[np.ndarray, np.ndarray]:
    """Documents and their lengths, (rounds, ranks, places): at the places that stay free, of which
    every micro-batch has some, num_documents and 0."""
    most = max(len(group) for each in rounds for group in each)
    held = np.full((len(rounds), len(rounds[0]), most + 2), len(lengths))
    for k, each in enumerate(rounds):
        for r, group in enumerate(each):
            held[k, r, : len(group)] = group
    return held, np.append(lengths, 0).astype(np.float64)[held]


def _least_squares(lengths: np.ndarray, world_size: int) -> float:
    """What the largest sum of squares of a round comes to at least while the tokens are even: the
    mean, or the longest document with the shortest ones that fill its micro-batch up."""
    *others, longest = np.sort(lengths).tolist()
    fill = np.searchsorted(np.cumsum(others), lengths.sum() / world_size - longest, side="right")
    alone = float(longest**2 + sum(n * n for n in others[:fill]))
    return max(float((lengths * lengths).sum()) / world_size, alone)


def _pairs(tokens: np.ndarray, squares: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The ranks, (rounds, pairs) each, that the heavier and the lighter halves send to an exchange.
    From one to the next it changes what counts as heavy, and who meets whom."""
    measures = (tokens, squares, tokens + squares / 2, tokens - squares / 2)
    order = np.argsort(-measures[number % 4], axis=1, kind="stable")
    num_pairs = tokens.shape[1] // 2
    heavy, light = order[:, :num_pairs], order[:, ::-1][:, :num_pairs]
    return heavy, np.roll(light, number // 4, axis=1)


def _places(num_places: int, number: int) -> np.ndarray:
    """The places that an exchange looks at: all, or a few that change, with a free one."""
    if num_places <= _CANDIDATES:
        return np.arange(num_places)
    spread = np.arange(_CANDIDATES - 1) * num_places // (_CANDIDATES - 1)
    return np.append((spread + number) % num_places, num_places - 1)


def _pad(sizes: Sequence[int], world_size: int, capacity: int) -> Groups:
    """Rows of like length together, the longest first, so that little is padded: in as few rounds
    as the capacity allows, and then with the smallest capacity that needs no more."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))

    def bins(capacity: int) -> list[list[int]]:
        found: list[list[int]] = []
        for i in order:
            if not found or (len(found[-1]) + 1) * sizes[found[-1][0]] > capacity:
                found.append([])
            found[-1].append(i)
        return found

    num_bins = world_size * max(1, -(-len(bins(capacity)) // world_size))
    least = max(sizes, default=0)
    # A larger capacity never needs more bins.
    enough = bisect_left(
        range(least, capacity), True, key=lambda smaller: len(bins(smaller)) <= num_bins
    )
    packed = bins(least + enough)
    empty: list[list[int]] = [[] for _ in range(num_bins - len(packed))]
    return [tuple(group) for group in packed + empty]
