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

from neftune_dist.data.balance import balance

# rounds[k][r]: positions within the step's documents that rank r takes in its micro-batch k.
Rounds = tuple[tuple[tuple[int, ...], ...], ...]


def assign_documents(
    lengths: np.ndarray,
    world_size: int,
    micro_batch_tokens: int,
    packing: bool,
    quadratic_tokens: float,
) -> Rounds:
    """Assign documents to the micro-batches of all ranks.

    Args:
        lengths: int64 (num_documents,), tokens, none above micro_batch_tokens.
        world_size: ranks that do not share documents.
        micro_batch_tokens: the most tokens of a micro-batch.
        packing: a micro-batch computes its tokens; otherwise its rows times its longest row.
        quadratic_tokens: length at which a document's attention costs as much as all else; the
            work of a document of L tokens is L (1 + L / quadratic_tokens).

    Returns:
        rounds[k][r]: the documents, as positions in `lengths`, of micro-batch k of rank r.
    """
    assert lengths.max(initial=0) <= micro_batch_tokens  # as `data.max_length`
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
        bins = balance(lengths, bins, num_bins // world_size, world_size, micro_batch_tokens)
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
    lengths: np.ndarray, work: np.ndarray, by_length: np.ndarray, world_size: int, capacity: int
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
