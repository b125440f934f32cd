"""The ranks that take part in the doctor's checks: of torchrun, of a Slurm step, or one alone."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neftune_dist.config import UserError
from neftune_dist.distributed.environment import Place, expand_hosts, number

if TYPE_CHECKING:
    from neftune_dist.distributed.mailbox import Mailbox

# Above the ports of runs (20000 to 32000), below those of most systems' outgoing connections.
_PORTS = range(12000, 20000)


@dataclass
class Ranks:
    """The ranks that are here.

    Attributes:
        place: of this rank.
        mailbox: by which they talk.
        present: those that have answered so far, in order.
        host_of: the host of each rank that came.
    """

    place: Place
    mailbox: Mailbox
    present: list[int]
    host_of: dict[int, str]

    @property
    def firsts(self) -> dict[str, int]:
        """The lowest present rank of each host."""
        lowest: dict[str, int] = {}
        for rank in self.present:
            lowest.setdefault(self.host_of[rank], rank)
        return lowest

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that checks its host."""
        return self.place.rank in self.firsts.values()

    def gather(self, name: str, value: Any, seconds: float) -> dict[int, Any]:
        """Return the values of all ranks, on all of them. Who posts none in time is left out, and
        present no more.

        Args:
            name: of what is gathered; all ranks gather the same, one after the other.
            value: this rank's, which is JSON-able.
            seconds: that rank 0 waits for the others.

        Raises:
            TimeoutError: rank 0 is gone, or went on without this rank.
        """
        self.mailbox.post(name, value)
        if self.place.rank == 0:
            found = self.mailbox.collect(name, self.present, seconds)
            self.mailbox.post(f"all {name}", [*found.items()])
        # This rank may have come earlier than rank 0, which counts from its own arrival.
        found = dict(self.mailbox.read(f"all {name}", 0, 2 * seconds))
        if self.place.rank not in found:
            raise TimeoutError("came after rank 0 had gone on without it")
        self.present = [*found]
        return found


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

    start = number("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"doctor {start}", connect(place, seconds))
    mailbox = Mailbox(store, place.rank, place.size)
    ranks = Ranks(place, mailbox, [*range(place.size)], {})
    ranks.host_of = ranks.gather("here", host_name(), seconds)
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
