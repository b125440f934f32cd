"""How a step's documents are dealt to ranks and micro-batches.

A layout decides speed, never what is trained. It is a pure function of the documents' lengths, so
every rank computes the same one and nothing is sent. All ranks run the same number of micro-batches
(collectives go in step); what has no document left is an empty micro-batch.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from neftune_dist.config import UserError


@dataclass(frozen=True)
class Layout:
    """groups[k][r]: positions within the step's documents that rank r takes in micro-batch k."""

    groups: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each rank runs."""
        return len(self.groups)


def lay_out(
    lengths: np.ndarray,
    world_size: int,
    micro_batch_tokens: int,
    packing: bool,
    quadratic_tokens: float,
) -> Layout:
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
        bins = _pack(sizes, world_size, micro_batch_tokens, work)
        costs = {tuple(group): sum(work(sizes[i]) for i in group) for group in bins}
    else:
        bins = _pad(sizes, world_size, micro_batch_tokens)
        costs = {tuple(group): len(group) * work(sizes[group[0]]) for group in bins if group}
    costs[()] = 0.0
    # Micro-batches that run at the same time cost about the same: neighbours in order of work.
    ordered = sorted(map(tuple, bins), key=lambda group: (-costs[group], group))
    # Within a round the heaviest goes to the rank that has worked least so far.
    load = [0.0] * world_size
    groups = []
    for first in range(0, len(ordered), world_size):
        ranks = sorted(range(world_size), key=lambda r: (load[r], r))
        dealt: list[tuple[int, ...]] = [()] * world_size
        for rank, group in zip(ranks, ordered[first : first + world_size], strict=True):
            dealt[rank] = group
            load[rank] += costs[group]
        groups.append(tuple(dealt))
    return Layout(tuple(groups))


def _pack(
    sizes: Sequence[int], world_size: int, capacity: int, work: Callable[[int], float]
) -> list[list[int]]:
    """Longest processing time first (Graham 1969) under a capacity: the longest document left goes
    to the bin with the least work that has room; one more bin a rank where none has."""
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    num_bins = world_size * max(1, -(-sum(sizes) // (world_size * capacity)))
    while True:
        bins = _fill(order, sizes, num_bins, capacity, work)
        if bins is not None:
            return bins
        num_bins += world_size


def _fill(
    order: Sequence[int],
    sizes: Sequence[int],
    num_bins: int,
    capacity: int,
    work: Callable[[int], float],
) -> list[list[int]] | None:
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
    for group in bins:
        group.sort()  # in the order of the schedule
    return bins


def _pad(sizes: Sequence[int], world_size: int, capacity: int) -> list[list[int]]:
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
    return packed + [[] for _ in range(num_bins - len(packed))]
