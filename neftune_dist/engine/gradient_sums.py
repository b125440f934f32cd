"""Sums of gradients over ranks, sent in buckets while the backward makes the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's


class GradientSums:
    """The float32 gradients of a step, summed over its micro-batches and over all ranks.

    Buckets are sent in one order on all ranks, about that in which a backward completes them, also
    where a rank has no gradient for some parameter: it contributes zeros. A parameter that has a
    gradient on no rank keeps none, so that no update moves it.

    Args:
        masters: float32; they get the sums as their `grad`.

    Attributes:
        is_last: whether the backward under way is the step's last one: it sends every bucket that
            it completes.
    """

    def __init__(self, masters: Sequence[nn.Parameter]) -> None:
        self.is_last = False
        self._buckets = [_Bucket([masters[i] for i in indices]) for indices in _cut(masters)]
        places = [(bucket, i) for bucket in self._buckets for i in range(len(bucket.masters))]
        self._places = places[::-1]  # by the parameter's index: buckets hold the last ones first
        self._num_sent = 0

    def add(self, index: int, computed: Tensor) -> None:
        """Take the gradient that the backward has just made for a parameter, and free it."""
        assert computed.grad is not None
        bucket, place = self._places[index]
        bucket.add(place, computed.grad)
        computed.grad = None
        if self.is_last:
            bucket.num_expected -= 1
            assert bucket.num_expected >= 0, "a backward has made a gradient twice"
            while self._num_sent < len(self._buckets):
                if self._buckets[self._num_sent].num_expected > 0:
                    break
                self._send_next()

    def finish(self) -> None:
        """Send what is left, wait for all, and give the masters their sums."""
        while self._num_sent < len(self._buckets):
            self._send_next()
        for bucket in self._buckets:
            bucket.wait()
        has_gradient = torch.cat([bucket.num_ranks for bucket in self._buckets]).tolist()
        for (bucket, place), known in zip(self._places[::-1], has_gradient, strict=True):
            bucket.masters[place].grad = bucket.views[place] if known else None
        self._num_sent, self.is_last = 0, False

    def _send_next(self) -> None:
        self._buckets[self._num_sent].send()
        self._num_sent += 1


class _Bucket:
    """Gradients in one buffer, and behind them for each parameter the number of ranks that have
    one."""

    def __init__(self, masters: Sequence[nn.Parameter]) -> None:
        self.masters = masters
        numels = [master.numel() for master in masters]
        self._content = masters[0].new_zeros(sum(numels) + len(masters), requires_grad=False)
        *parts, self.num_ranks = self._content.split([*numels, len(masters)])
        self.views = [part.view_as(m) for part, m in zip(parts, masters, strict=True)]
        self._filled = [False] * len(masters)
        self.num_expected = len(masters)  # gradients that the last backward has not made
        self._work: dist.Work | None = None

    def add(self, place: int, gradient: Tensor) -> None:
        if self._filled[place]:
            self.views[place].add_(gradient)
        else:
            self.views[place].copy_(gradient)
            self._filled[place] = True

    def send(self) -> None:
        for view, filled in zip(self.views, self._filled, strict=True):
            if not filled:
                view.zero_()
        if all(self._filled):
            self.num_ranks.fill_(1)  # without a copy, for which the host would wait for the GPU
        else:
            self.num_ranks.copy_(torch.tensor(self._filled))
        self._work = dist.all_reduce(self._content, async_op=True)

    def wait(self) -> None:
        assert self._work is not None
        self._work.wait()
        self._work = None
        self._filled = [False] * len(self.masters)
        self.num_expected = len(self.masters)


def _cut(masters: Sequence[nn.Parameter]) -> Iterator[list[int]]:
    """Indices of the parameters of each bucket: from the last, with which a backward begins."""
    indices: list[int] = []
    num_bytes = 0
    for index in reversed(range(len(masters))):
        indices.append(index)
        num_bytes += masters[index].nbytes
        if num_bytes >= _BUCKET_BYTES:
            yield indices
            indices, num_bytes = [], 0
    if indices:
        yield indices
