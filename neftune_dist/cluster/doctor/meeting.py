"""Where the ranks meet: a process's place among those started together, and words between them.

Everything here goes over torch's key-value store, apart from any process group, and nothing waits
without end: a rank that does not come is named, and the others are heard all the same.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from neftune_dist.cluster.doctor.findings import named
from neftune_dist.config import UserError
from neftune_dist.distributed.environment import number

_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.01, 0.5
_CONNECT_SECONDS = 20.0  # once somebody listens at the address
_WORD_SECONDS = 60.0  # of the store itself, for one answer
# Above the ports of runs (20000 to 32000), below those of most systems' outgoing connections.
_PORTS = range(12000, 20000)


@dataclass(frozen=True)
class Place:
    """This process among those started together: by torchrun, by srun, or alone.

    Attributes:
        rank, size: of all processes. local_rank: of those on this machine.
        host: this machine's name, which Slurm may have given it.
        address, port: where rank 0's store listens; empty and 0 for a process alone.
        hosts: of the machines that are to come, where that is known.
        of_slurm: started by srun, without torchrun.
    """

    rank: int
    size: int
    local_rank: int
    host: str
    address: str = ""
    port: int = 0
    hosts: tuple[str, ...] = ()
    of_slurm: bool = False

    @staticmethod
    def here() -> Place:
        """From torchrun's variables, else from those of the Slurm step this process is a task of.

        A batch script has SLURM_PROCID as well, but no step: it is alone.
        """
        variables = os.environ
        host = variables.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
        if "RANK" in variables:
            return Place(
                number("RANK", 0),
                number("WORLD_SIZE", 1, least=1),
                number("LOCAL_RANK", 0),
                host,
                variables.get("MASTER_ADDR", ""),
                number("MASTER_PORT", 0),
            )
        size = number("SLURM_STEP_NUM_TASKS", 1, least=1)
        if size == 1 or "SLURM_PROCID" not in variables:
            return Place(0, 1, 0, host)
        try:
            hosts = expand(variables.get("SLURM_STEP_NODELIST", ""))
        except ValueError:
            hosts = []
        if not hosts:
            raise UserError("SLURM_STEP_NODELIST does not name the hosts of this step.")
        job, step = (number(name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        return Place(
            number("SLURM_PROCID", 0),
            size,
            number("SLURM_LOCALID", 0),
            host,
            hosts[0],
            _PORTS[(job * 31 + step) % len(_PORTS)],
            tuple(hosts),
            of_slurm=True,
        )


def expand(hosts: str) -> list[str]:
    """The names that Slurm means by "gpu[01-03,7]-ib,login"."""
    names = []
    for each in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", hosts):
        parts = [
            _numbers(p[1:-1]) if p[0] == "[" else [p] for p in re.findall(r"\[.*?\]|[^\[]+", each)
        ]
        names += ["".join(chosen) for chosen in itertools.product(*parts)]
    return names


def _numbers(ranges: str) -> list[str]:
    numbers = []
    for each in ranges.split(","):
        first, _, last = each.partition("-")
        numbers += [f"{i:0{len(first)}}" for i in range(int(first), int(last or first) + 1)]
    return numbers


@dataclass(frozen=True)
class Roll:
    """Who came.

    Attributes:
        host_of: each rank that came. firsts: the lowest rank of each host.
        token: a word that only this meeting uses.
    """

    host_of: dict[int, str]
    token: str

    @property
    def firsts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for rank, host in sorted(self.host_of.items()):
            found.setdefault(host, rank)
        return found


class Meeting:
    """Words between the ranks of one place, each said once under a name.

    Raises:
        Exception: torch cannot be imported, or rank 0 cannot be reached in time.
    """

    def __init__(self, place: Place, seconds: float) -> None:
        import torch.distributed as dist

        self.place = place
        if place.size == 1:
            self.store: Any = dist.HashStore()
            return
        if not place.address:
            raise ValueError("MASTER_ADDR is not set")
        # Under torchrun its agent listens for the ranks.
        listens = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not listens:
            _await_listener(place.address, place.port, seconds)
        server = dist.TCPStore(
            place.address,
            place.port,
            is_master=listens,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False,
        )
        server.set_timeout(timedelta(seconds=_WORD_SECONDS))
        self.store = dist.PrefixStore("doctor", server)

    def say(self, name: str, value: Any) -> None:
        """A word of this rank's, JSON-able, for whoever listens."""
        self.store.set(f"{name}/{self.place.rank}", json.dumps(value))

    def hear(self, name: str, rank: int, seconds: float) -> Any:
        """What `rank` says; a `TimeoutError` where it says nothing for so long."""
        heard = self.collect(name, [rank], seconds)
        if rank not in heard:
            raise TimeoutError(f"rank {rank} said nothing for {seconds:.0f} seconds")
        return heard[rank]

    def collect(
        self,
        name: str,
        ranks: Iterable[int],
        seconds: float,
        missing: Callable[[Sequence[int]], None] | None = None,
    ) -> dict[int, Any]:
        """What those of `ranks` say who do so in time.

        Args:
            missing: told every ten seconds who has said nothing yet.
        """
        awaited, heard = sorted(ranks), {}
        began, next_notice, pause = time.monotonic(), 10.0, _POLL_SECONDS
        while True:
            for rank in [each for each in awaited if self.store.check([f"{name}/{each}"])]:
                heard[rank] = json.loads(self.store.get(f"{name}/{rank}"))
                awaited.remove(rank)
            waited = time.monotonic() - began
            if not awaited or waited > seconds:
                return heard
            if missing and waited > next_notice:
                missing(awaited)
                next_notice += 10.0
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST_POLL_SECONDS)  # many ranks may wait for rank 0

    def roll(self, seconds: float, notice: Callable[[str], None]) -> Roll:
        """Wait until all ranks are there, or so long.

        Raises:
            TimeoutError: rank 0 is not there, or went on without this rank.
        """
        place = self.place
        self.say("here", place.host)
        if place.rank == 0:

            def missing(ranks: Sequence[int]) -> None:
                notice(
                    f"waiting for rank{'s' if len(ranks) > 1 else ''} {named([*map(str, ranks)])}"
                )

            came = self.collect("here", range(place.size), seconds, missing)
            self.say("roll", [list(came.items()), os.urandom(4).hex()])
        # Others may have come earlier than rank 0, which counts from its own arrival.
        came, token = self.hear("roll", 0, 2 * seconds)
        roll = Roll(dict(came), token)
        if place.rank not in roll.host_of:
            raise TimeoutError("came after rank 0 had gone on without it")
        return roll


def _await_listener(address: str, port: int, seconds: float) -> None:
    """Return once somebody listens there. Torch's own wait is silent about the cause, and then
    prints a native stack."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{address}:{port}, where rank 0 is to listen, was not reached for "
                    f"{seconds:.0f} seconds ({error.strerror or error})"
                ) from error
        time.sleep(0.2)
