"""The process group of all ranks, made when all of them are here."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from neftune_dist.config import UserError
from neftune_dist.distributed import outcome
from neftune_dist.distributed.environment import Place
from neftune_dist.distributed.mailbox import connect, wait_until
from neftune_dist.distributed.signals import Stopped, StopSignal
from neftune_dist.system.text import first_line
from neftune_dist.system.versions import package_versions

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# How long a rank that was asked to stop goes on waiting for the others, which may be gone.
STOP_PATIENCE_SECONDS = 5.0
# How long ranks that are here wait for one whose imports hang.
_MEETING_SECONDS = 900.0


def make_process_group(
    place: Place, device: torch.device, store: dist.Store | None, stop: StopSignal | None
) -> None:
    """Make the process group of all ranks.

    Args:
        place: of this rank.
        device: where it computes.
        store: by which the ranks already talk; None: they meet as torchrun's variables say.
        stop: requests that end the wait for the others.

    Raises:
        UserError: the ranks do not find each other.
        Stopped: a request came before all were here.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    device_id = device if backend == "nccl" else None
    if not place.address:
        # The engines want a process group even for one process; this one needs no network.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    try:
        if store is None:
            store = connect(place, _MEETING_SECONDS)
            store.set_timeout(COLLECTIVE_TIMEOUT)
            store = _await_all(store, place, stop)
        dist.init_process_group(
            backend,
            store=store,
            rank=place.rank,
            world_size=place.size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device_id,
        )
    except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
        if outcome.VARIABLE in os.environ:  # the launcher knows why the others are gone
            raise
        raise UserError(
            f"Rank {place.rank} of {place.size} did not meet the others at {place.address} port "
            f"{place.port}: {first_line(error)}"
        ) from error


def _await_all(store: dist.Store, place: Place, stop: StopSignal | None) -> dist.Store:
    """Wait until all ranks are here, or for so long; a launcher then starts all of them again.

    Machines with other versions are refused: they could train another model.

    torch's own wait hears no signal, does not say who is missing, and, where torchrun starts ranks
    again, looks for those that have died: their keys stay, and TORCHELASTIC_RESTART_COUNT counts
    the failures of each machine for itself. So every process takes a number, and rank 0 gives its
    own to all that come.

    Returns:
        The store of the ranks of this start alone.
    """
    own, began = package_versions(), time.monotonic()
    number, num_answered = store.add("arrivals", 1), 0
    store.set(f"here/{place.rank}", "")

    def is_there(where: dist.Store, key: str) -> bool:
        nonlocal num_answered
        if stop and stop.has_waited(began, STOP_PATIENCE_SECONDS):
            raise Stopped
        while place.rank == 0 and num_answered < arrivals.add("arrivals", 0):
            num_answered += 1
            arrivals.set(f"start of {num_answered}", str(number))
        return where.check([key])

    def wait_for(key: str) -> bool:
        return wait_until(lambda: is_there(store, key), place.size, _MEETING_SECONDS)

    arrivals = store
    if wait_for(f"start of {number}"):
        store = dist.PrefixStore(f"start {store.get(f'start of {number}').decode()}", store)
        store.set(f"here/{place.rank}", json.dumps(own))
        # A rank that died meanwhile, and was started again, comes twice.
        everybody = [f"here/{rank}" for rank in range(place.size)]
        if store.add("number here", 1) >= place.size and store.check(everybody):
            store.set("all here", "")
        if wait_for("all here"):
            first = json.loads(store.get("here/0"))
            if other := [name for name in {**own, **first} if own.get(name) != first.get(name)]:
                here, there = (found.get(other[0], "none") for found in (own, first))
                raise UserError(
                    f"Rank {place.rank}, on {socket.gethostname()}, has {other[0]} {here}, and "
                    f"rank 0 has {there}: install the same versions on all machines."
                )
            return store
    missing = [rank for rank in range(place.size) if not store.check([f"here/{rank}"])]
    named = ", ".join(map(str, missing[:8])) + (" ..." if len(missing) > 8 else "")
    text = (
        f"hang: {len(missing)} of {place.size} ranks did not start within "
        f"{_MEETING_SECONDS / 60:g} minutes (rank {named}): a machine hangs, or reads Python's "
        "packages from a slow disk"
    )
    if outcome.tell(place.rank, outcome.FAILED, error=text):
        print(f"neftune-dist: {text}", file=sys.stderr, flush=True)
        sys.exit(outcome.EXIT_FAILED)
    raise UserError(f"{text}.")
