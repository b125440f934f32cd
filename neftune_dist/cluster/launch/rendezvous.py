"""The rendezvous of a job's nodes, in the attempt's folder, which all of them see.

Files serve here because there is no store yet: the nodes are about to learn where it listens. No
port needs to be agreed on beforehand, so two jobs never share one; and the address is that of the
interface that leads to the other nodes, which the name of a host need not be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from neftune_dist.config import read_json
from neftune_dist.system import storage
from neftune_dist.system.network import address_towards, free_port

# Each look lists a folder of the shared file system. Node 0 is alone in looking for the others, who
# may be hundreds.
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = {"node 0": 0.5, "other": 2.0}


def meet(folder: Path, hosts: Sequence[str], index: int, seconds: float) -> tuple[str, int]:
    """Wait until all nodes are there; return the address and port at which node 0 will listen.

    Args:
        folder: of the attempt, which all nodes see.
        hosts: of all nodes, in order.
        index: of this node.
        seconds: to wait at most.

    Raises:
        TimeoutError: names the hosts that did not come.
        UserError: no port, or no way to the other nodes.
    """
    deadline = time.monotonic() + seconds
    place, pause = folder / "rendezvous.json", _FIRST_PAUSE_SECONDS
    while time.monotonic() < deadline:
        # Listing a folder makes a network file system look again.
        there = {path.name for path in folder.iterdir()}
        if place.name in there:
            found = read_json(place, {"address": str, "port": int})
            return found["address"], found["port"]
        if index == 0 and not missing_hosts(folder, hosts):
            found = {"address": address_towards(hosts[1]), "port": free_port()}
            storage.write(place, json.dumps(found))
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(1.2 * pause, _LONGEST_PAUSE_SECONDS["other" if index else "node 0"])
    missing = missing_hosts(folder, hosts)
    if index == 0:
        raise TimeoutError(
            f"{', '.join(missing)} did not come within {seconds / 60:g} minutes: either the node "
            f"is late or down, or it does not see {folder}, which must lie on a file system that "
            "all nodes share"
        )
    raise TimeoutError(
        f"{hosts[0]}, which starts the rendezvous, did not do so within {seconds / 60:g} minutes"
        + (f"; not there: {', '.join(missing)}" if missing else "")
    )


def arrive(folder: Path, index: int) -> None:
    """Mark this node as started."""
    (folder / f"node_{index}").touch()


def missing_hosts(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Return the hosts whose node has not started."""
    there = {path.name for path in folder.iterdir()}
    return [host for i, host in enumerate(hosts) if f"node_{i}" not in there]
