"""The ranks that take part in the doctor's checks: of torchrun, of a Slurm step, or one alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from neftune_dist.config import UserError
from neftune_dist.distributed.environment import Place, expand_hosts, number

if TYPE_CHECKING:
    from neftune_dist.distributed.mailbox import Mailbox

# Above the ports of runs (20000 to 32000), below those of most systems' outgoing connections.
_PORTS = range(12000, 20000)


@dataclass(frozen=True)
class Ranks:
    """The ranks that are here.

    Attributes:
        place: of this rank.
        mailbox: by which they talk.
        host_of: the host of each rank.
        token: a word that only these ranks know.
    """

    place: Place
    mailbox: Mailbox
    host_of: Mapping[int, str]
    token: str

    @property
    def host(self) -> str:
        """The host of this rank."""
        return self.host_of[self.place.rank]

    @property
    def firsts(self) -> dict[str, int]:
        """The lowest rank of each host, which checks it."""
        lowest = {host: rank for rank, host in sorted(self.host_of.items(), reverse=True)}
        return dict(sorted(lowest.items(), key=lambda pair: pair[1]))

    def of_hosts(self, hosts: Sequence[str]) -> Ranks:
        """Those on `hosts`."""
        kept = {rank: host for rank, host in self.host_of.items() if host in hosts}
        return replace(self, host_of=kept)


def host_name() -> str:
    """This machine's name; Slurm may have given it another one than its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]


def meet(place: Place, seconds: float) -> Ranks:
    """Wait until all ranks are here, or for so long.

    Raises:
        TimeoutError: rank 0 is not here, or went on without this rank.
        ImportError: torch cannot be imported.
    """
    import torch.distributed as dist

    from neftune_dist.distributed.mailbox import Mailbox, connect

    store = dist.PrefixStore("doctor", connect(place, seconds))
    mailbox = Mailbox(store, place.rank, place.size)
    mailbox.post("here", host_name())
    if place.rank == 0:
        came = mailbox.collect("here", range(place.size), seconds)
        mailbox.post("came", [list(came.items()), os.urandom(4).hex()])
    # Other ranks may have come earlier than rank 0, which counts from its own arrival.
    rows, token = mailbox.read("came", 0, 2 * seconds)
    ranks = Ranks(place, mailbox, dict(map(tuple, rows)), token)
    if place.rank not in ranks.host_of:
        raise TimeoutError("came after rank 0 had gone on without it")
    return ranks


def slurm_step() -> tuple[dict[str, str], list[str]]:
    """Torchrun's variables for a task of a Slurm step, and the step's hosts.

    Both are empty under torchrun, and in a batch script, which has SLURM_PROCID but no step.
    """
    size = number("SLURM_STEP_NUM_TASKS", 1, least=1)
    if "RANK" in os.environ or size == 1 or "SLURM_PROCID" not in os.environ:
        return {}, []
    hosts = expand_hosts(os.environ.get("SLURM_STEP_NODELIST", ""))
    if not hosts:
        raise UserError("SLURM_STEP_NODELIST does not name the hosts of this step.")
    job, step = (number(name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    variables = {
        "RANK": number("SLURM_PROCID", 0),
        "WORLD_SIZE": size,
        "LOCAL_RANK": number("SLURM_LOCALID", 0),
        "MASTER_ADDR": hosts[0],
        "MASTER_PORT": _PORTS[(job * 31 + step) % len(_PORTS)],
    }
    return {name: str(value) for name, value in variables.items()}, hosts
