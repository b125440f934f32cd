"""Messages between ranks outside of collectives, over torch's key-value (rendezvous) store.

`World`, the watchdog and the doctor talk by this alone; files hold what outlives the processes.

A rank that waits asks again and again: the store's own blocking wait heeds no signal, and prints
warnings whenever its time is up. One process answers all ranks, some 13,000 to 24,000 requests a
second. The pause between two questions therefore grows with the number of ranks, so that all of
them together ask at most `_REQUESTS_PER_SECOND`. `python tests/benchmarks/waiting_ranks.py`, 2
cores, 2026-11-26: 512 waiting ranks make 5,017 requests a second, 2,048 make 4,972; a request of
another rank meanwhile takes 0.1 and 0.2 ms, and all go on 0.13 and 0.99 s after the last one came
(with a fixed pause of 50 ms: 23,394 requests, 25 ms, 0.70 s for 2,048).
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from neftune_dist.distributed.environment import Place

_REQUESTS_PER_SECOND = 5000.0
_REQUESTS_PER_QUESTION = 2
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.005, 0.05  # seconds, of a few ranks
_CONNECT_SECONDS = 20.0  # once a process listens at the address
_ANSWER_SECONDS = 60.0  # for one answer of the store


def pauses(num_ranks: int) -> Iterator[float]:
    """Seconds that a rank lets pass between one question to the store and the next, without end."""
    least = num_ranks * _REQUESTS_PER_QUESTION / _REQUESTS_PER_SECOND
    pause = max(_SHORTEST_PAUSE, least)
    while True:
        yield pause
        pause = min(1.2 * pause, max(_LONGEST_PAUSE, least))


def wait_until(condition: Callable[[], bool], num_ranks: int, seconds: float) -> bool:
    """Ask until `condition` holds or the time is over; whether it holds.

    Args:
        condition: one question to the store.
        num_ranks: that may be asking at the same time.
        seconds: to wait at most.
    """
    deadline = time.monotonic() + seconds
    for pause in pauses(num_ranks):
        if condition():
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
    raise AssertionError("pauses end")


class Mailbox:
    """Values that ranks post under a name, one a rank, for any rank to read."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size

    def post(self, name: str, value: Any) -> None:
        """Post this rank's value, which is JSON-able."""
        self.store.set(f"{name}/{self.rank}", json.dumps(value))

    def collect(self, name: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        """Return the values that ranks post in time, by rank.

        Args:
            name: under which they post.
            ranks: to wait for.
            seconds: to wait at most, for all of them.
        """
        deadline, found = time.monotonic() + seconds, dict[int, Any]()
        for rank in ranks:
            key = f"{name}/{rank}"
            left = deadline - time.monotonic()
            if wait_until(lambda key=key: self.store.check([key]), self.size, left):  # type: ignore[misc]
                found[rank] = json.loads(self.store.get(key))
        return found

    def read(self, name: str, rank: int, seconds: float) -> Any:
        """Return the value of one rank.

        Args:
            name: under which it posts.
            rank: to wait for.
            seconds: to wait at most.

        Raises:
            TimeoutError: it posts none.
        """
        found = self.collect(name, [rank], seconds)
        if rank not in found:
            raise TimeoutError(f"rank {rank} did not answer within {seconds:.0f} seconds")
        return found[rank]


def connect(place: Place, seconds: float) -> dist.Store:
    """Return the rendezvous store of the ranks of `place`, without waiting for all of them.

    Rank 0 hosts it, unless torchrun's agent does, which keeps it, and all keys, when it starts the
    ranks again (--max-restarts).

    Raises:
        TimeoutError: no process listens at rank 0's address within `seconds`.
    """
    if place.size == 1:
        return dist.HashStore()
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_host = place.rank == 0 and not by_agent
    if not is_host:
        _await_listener(place, seconds)
    store = dist.TCPStore(
        place.address,
        place.port,
        is_master=is_host,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
        wait_for_workers=False,
    )
    store.set_timeout(timedelta(seconds=_ANSWER_SECONDS))
    return store


def _await_listener(place: Place, seconds: float) -> None:
    """Wait until a process listens at rank 0's address.

    Torch would wait for it too, but does not say why it failed, and prints a native stack.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{place.address}:{place.port}, where rank 0 is to listen, was not reached for "
                    f"{seconds:.0f} seconds ({error.strerror or error})"
                ) from error
        time.sleep(0.2)
