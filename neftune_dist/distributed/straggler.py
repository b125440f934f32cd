"""Stragglers: ranks that compute slower than the others, or wait for their data, named in the log.

A step takes the same time on all ranks, so its duration does not show who is slow. Every few steps
each rank measures how long a fixed piece of arithmetic takes on its device, and the share of its
time since then that it waited for its loader. Nothing here changes the training.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from neftune_dist.distributed.hang_report import name_ranks
from neftune_dist.distributed.world import World

_EVERY_STEPS = 10
# Measurements in a row that must find a rank slow: one may meet a passing disturbance.
_IN_A_ROW = 3
# Thresholds: least speed relative to the median rank; most time spent waiting for data.
_LEAST_SPEED = 1 / 1.5
_MOST_WAITING = 0.1
# Side of the square matrices, and products of them, that take a millisecond or two of a GPU or less
# of a core.
_CUDA_PROBE, _CPU_PROBE = (2048, 3), (256, 1)


class Stragglers:
    """Measures this rank; on rank 0 compares all. Made on all ranks together."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._hosts: list[Any] = [None] * world.size
        dist.all_gather_object(self._hosts, socket.gethostname())
        self._slow, self._starved = Streaks(world.size), Streaks(world.size)
        self._waited, self._since = 0.0, time.perf_counter()
        side, self._products = _CUDA_PROBE if world.device.type == "cuda" else _CPU_PROBE
        self._factor = torch.full((side, side), 0.5, device=world.device)
        self._product = torch.empty_like(self._factor)

    def waited(self, seconds: float) -> None:
        """Add time that this rank waited for its loader."""
        self._waited += seconds

    def measure(self, step: int) -> tuple[float, float]:
        """Seconds of the fixed arithmetic on this rank, and the share of its time since the last
        measurement that it waited for data; zeros at the steps between measurements."""
        if self._world.size == 1 or step % _EVERY_STEPS:
            return 0.0, 0.0
        now = time.perf_counter()
        share = self._waited / (now - self._since)
        self._waited, self._since = 0.0, now
        return self._probe(), share

    def compare(self, seconds: Sequence[float], shares: Sequence[float]) -> None:
        """Name in the log the ranks that have become stragglers.

        Args:
            seconds: time of the fixed arithmetic, by rank.
            shares: of time waiting for data, by rank.
        """
        if not self._world.is_first or not any(seconds):
            return
        speeds = relative_speeds(seconds)
        for rank in self._slow.lasting([speed < _LEAST_SPEED for speed in speeds]):
            self._world.log(
                f"straggler: {self._who([rank])} computes at {speeds[rank]:.2f} of the median "
                f"rank's speed ({_IN_A_ROW} probes in a row)"
            )
        starved = self._starved.lasting([share > _MOST_WAITING for share in shares])
        if starved:
            most = max(shares[rank] for rank in starved)
            self._world.log(
                f"straggler: {self._who(starved)} waited for data, for up to {most:.0%} of the "
                f"time of the last {_EVERY_STEPS} steps"
            )

    def _who(self, ranks: Sequence[int]) -> str:
        hosts = dict.fromkeys(self._hosts[rank] for rank in ranks)
        return f"{name_ranks(ranks)} on {', '.join(hosts)}"

    @torch.no_grad()
    def _probe(self) -> float:
        """Seconds of the fixed arithmetic, on a device that has nothing else to do."""
        best = float("inf")
        for _ in range(3):  # the least disturbed one counts
            self._finish()
            start = time.perf_counter()
            for _ in range(self._products):
                torch.mm(self._factor, self._factor, out=self._product)
            self._finish()
            best = min(best, time.perf_counter() - start)
        return best

    def _finish(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)


class Streaks:
    """Ranks that were slow in enough measurements in a row; a streak is reported once."""

    def __init__(self, num_ranks: int) -> None:
        self._lengths = [0] * num_ranks

    def lasting(self, slow: Sequence[bool]) -> list[int]:
        """Take a measurement of every rank; return those whose streak has become long enough."""
        self._lengths = [n + 1 if now else 0 for n, now in zip(self._lengths, slow, strict=True)]
        return [rank for rank, length in enumerate(self._lengths) if length == _IN_A_ROW]


def relative_speeds(seconds: Sequence[float]) -> list[float]:
    """Return the speeds of ranks that took `seconds` for equal work, relative to the median rank.

    Of two ranks the faster one is the median.
    """
    typical = statistics.median_low(seconds)
    return [typical / taken for taken in seconds]
