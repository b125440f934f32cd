"""The packing's first implementation, slower and easier to read: `neftune_dist.data.packing` must
assign the same documents."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np

from neftune_dist.config import UserError

Groups = list[tuple[int, ...]]
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
    sizes = [int(n) for n in lengths]
    if sizes and max(sizes) > micro_batch_tokens:
        raise UserError(
            f"A document of {max(sizes)} tokens does not fit into train.micro_batch_tokens="
            f"{micro_batch_tokens}, and a document is never split: raise it."
        )

    def work(size: int) -> float:
        return size * (1 + size / quadratic_tokens)

    if packing:
        # Rounds of similar squares: long documents run beside long documents.
        bins = _pack(sizes, world_size, micro_batch_tokens, work)
        rounds = _in_rounds(bins, [sum(sizes[i] ** 2 for i in group) for group in bins], world_size)
        rounds = _balance(lengths, rounds, micro_batch_tokens)
    else:
        bins = _pad(sizes, world_size, micro_batch_tokens)
        rounds = _in_rounds(bins, [_padded(sizes, group, work) for group in bins], world_size)
    # Within a round the heaviest group goes to the rank with the least work so far.
    load = [0.0] * world_size
    assigned = []
    for groups in rounds:
        costs = [
            sum(work(sizes[i]) for i in group) if packing else _padded(sizes, group, work)
            for group in groups
        ]
        heaviest = sorted(range(world_size), key=lambda b: (-costs[b], groups[b]))
        ranks = sorted(range(world_size), key=lambda r: (load[r], r))
        by_rank: Groups = [()] * world_size
        for rank, b in zip(ranks, heaviest, strict=True):
            by_rank[rank] = groups[b]
            load[rank] += costs[b]
        assigned.append(tuple(by_rank))
    return tuple(assigned)


def _in_rounds(bins: Groups, costs: Sequence[float], world_size: int) -> list[Groups]:
    """Rounds of world_size bins of similar cost, the heaviest first."""
    order = sorted(range(len(bins)), key=lambda b: (-costs[b], bins[b]))
    ordered = [bins[b] for b in order]
    return [ordered[first : first + world_size] for first in range(0, len(ordered), world_size)]


def _padded(sizes: Sequence[int], group: Sequence[int], work: Callable[[int], float]) -> float:
    """Work of padded rows: every row costs as much as the longest."""
    return len(group) * work(max((sizes[i] for i in group), default=0))


def _pack(
    sizes: Sequence[int], world_size: int, capacity: int, work: Callable[[int], float]
) -> Groups:
    """Bins for as few rounds as possible. The bins of `_fill` are balanced but need more room than
    those of `_fit`, which are used only where that saves a round."""
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
    """Best fit decreasing (Johnson 1973): the longest remaining document goes where it leaves the
    least room."""
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
    """Longest processing time first (Graham 1969) under a capacity: the longest remaining document
    goes to the bin with the least work that has room; None where no bin has."""
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
        for entry in full:
            heapq.heappush(heap, entry)
    return bins


def _balance(lengths: np.ndarray, rounds: list[Groups], capacity: int) -> list[Groups]:
    """The rounds after exchanges of documents within every round."""
    world_size = len(rounds[0])
    if world_size == 1 or len(lengths) == 0:
        return rounds
    held, size = _as_arrays(lengths, rounds)
    mean = size.sum((1, 2)) / world_size
    least = np.array([_least_squares(row[row > 0], world_size) for row in size])
    scale = np.stack([mean, least])[..., None]  # (tokens or squares, rounds, 1)
    for weight in _SQUARES_WEIGHTS:
        quiet = 0
        for number in range(_MOST_EXCHANGES):
            load = np.stack([size, size * size])  # (tokens or squares, rounds, ranks, places)
            # Sums of whole numbers, exact in any order: all machines find the same rounds.
            totals = load.sum(3) / scale
            tokens, squares = totals
            balanced = (
                abs(tokens - 1).max() < _TOKENS_TOLERANCE and squares.max() < 1 + _SQUARES_TOLERANCE
            )
            if balanced or quiet == _MOST_QUIET:
                break
            pairs, places = _pairs(tokens, squares, number), _places(size.shape[2], number)
            swaps = _best_swaps(load, totals, scale, pairs, places, capacity / mean, weight)
            if swaps is None:
                quiet += 1
                continue
            quiet = 0
            one, other = swaps
            for array in (held, size):
                array[one], array[other] = array[other], array[one]
    return [
        [tuple(sorted(int(i) for i in group if i < len(lengths))) for group in groups]
        for groups in held
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
    """The best swap of every pair of micro-batches, as two places; None where no swap gains.

    The objective, summed over micro-batches: the squared distance of the tokens from their mean,
    plus `weight` times the squared excess of the squares over `_least_squares`. A swap with a free
    place is a move.

    Args:
        load: tokens and squares of every place, (2, rounds, ranks, places).
        totals: their sums over places relative to `scale`, (2, rounds, ranks).
        scale: the mean tokens and the least squares of a round, (2, rounds, 1).
        pairs: the ranks that exchange, (rounds, pairs) twice.
        places: the places considered.
        room: capacity relative to the mean tokens, (rounds,).
        weight: of the squares.
    """

    def uneven(totals: np.ndarray) -> np.ndarray:
        excess = np.maximum(totals[1] - (1 + _SQUARES_TOLERANCE), 0)
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
    # A full micro-batch is exactly full: rounding must not count as overfull.
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


def _as_arrays(lengths: np.ndarray, rounds: list[Groups]) -> tuple[np.ndarray, np.ndarray]:
    """Documents and their lengths, (rounds, ranks, places). Every micro-batch has some free places,
    which hold num_documents and length 0."""
    most = max(len(group) for groups in rounds for group in groups)
    held = np.full((len(rounds), len(rounds[0]), most + 2), len(lengths))
    for k, groups in enumerate(rounds):
        for r, group in enumerate(groups):
            held[k, r, : len(group)] = group
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


def _pad(sizes: Sequence[int], world_size: int, capacity: int) -> Groups:
    """Rows of similar length together, the longest first, so that little is padded: in as few
    rounds as the capacity allows, and then with the smallest capacity that needs no more."""
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
