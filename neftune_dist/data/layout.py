"""How a step's documents are dealt to ranks and micro-batches.

A layout decides speed, never what is trained. It is a pure function of the documents' lengths, so
every rank computes the same one and nothing is sent. All ranks run the same number of micro-batches
(collectives go in step); what has no document left is an empty micro-batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
        lengths: int64 (num_documents,), tokens, none above micro_batch_tokens.
        packing: a micro-batch costs its tokens; otherwise its rows times its longest row.
        quadratic_tokens: length at which a document's attention costs as much as all else; the
            work of a document of L tokens is L (1 + L / quadratic_tokens).
    """
    if packing:
        bins = _pack(lengths, world_size, micro_batch_tokens, quadratic_tokens)
    else:
        bins = _pad(lengths, world_size, micro_batch_tokens)
    # Micro-batches that run at the same time cost about the same: neighbours in order of work.
    work = lengths * (1 + lengths / quadratic_tokens)
    bins.sort(key=lambda group: (-sum(work[i] for i in group), group))
    rounds = [bins[k : k + world_size] for k in range(0, len(bins), world_size)]
    # Within a round the heaviest goes to the rank that has worked least so far.
    load = [0.0] * world_size
    groups = []
    for round_ in rounds:
        ranks = sorted(range(world_size), key=lambda r: (load[r], r))
        dealt: list[tuple[int, ...]] = [()] * world_size
        for rank, group in zip(ranks, round_, strict=True):
            dealt[rank] = tuple(group)
            load[rank] += float(sum(work[i] for i in group))
        groups.append(tuple(dealt))
    return Layout(tuple(groups))


def _pack(
    lengths: np.ndarray, world_size: int, capacity: int, quadratic_tokens: float
) -> list[list[int]]:
    """Longest processing time first (Graham 1969) under a capacity: the longest document left goes
    to the bin with the least work that has room; one more bin a rank where none has."""
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    sizes = [int(n) for n in lengths]
    num_bins = world_size * max(1, -(-sum(sizes) // (world_size * capacity)))
    while True:
        bins = _fill(order, sizes, num_bins, capacity, quadratic_tokens)
        if bins is not None:
            return bins
        num_bins += world_size


def _fill(
    order: Sequence[int],
    sizes: Sequence[int],
    num_bins: int,
    capacity: int,
    quadratic_tokens: float,
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, b, 0) for b in range(num_bins)]  # work, bin, tokens
    for i in order:
        full = []
        while heap and heap[0][2] + sizes[i] > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        work, b, tokens = heapq.heappop(heap)
        bins[b].append(i)
        work += sizes[i] * (1 + sizes[i] / quadratic_tokens)
        heapq.heappush(heap, (work, b, tokens + sizes[i]))
        for each in full:
            heapq.heappush(heap, each)
    for group in bins:
        group.sort()  # in the order of the schedule
    return bins


def _pad(lengths: np.ndarray, world_size: int, capacity: int) -> list[list[int]]:
    """Rows of like length together, so that little is padded; as even as the capacity allows."""
    order = sorted(range(len(lengths)), key=lambda i: (-int(lengths[i]), i))
    num_rounds = 1
    while True:
        per_bin = -(-len(order) // (num_rounds * world_size))
        bins = [order[k : k + per_bin] for k in range(0, len(order), per_bin)]
        if all(len(group) * int(lengths[group[0]]) <= capacity for group in bins):
            break
        num_rounds += 1
    bins += [[] for _ in range(-len(bins) % world_size)]
    return bins
