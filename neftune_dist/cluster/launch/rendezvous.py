"""How the nodes of a job find each other: in the attempt's folder, which all of them see.

No port needs to be agreed on beforehand, so none is shared by two jobs; and the address is that of
the interface which leads to the other nodes, not what a host's own name happens to mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from neftune_dist.config import read_json
from neftune_dist.system import storage
from neftune_dist.system.network import address_towards, free_port

_POLL_SECONDS = 0.2


def meet(folder: Path, hosts: Sequence[str], index: int, seconds: float) -> tuple[str, int]:
    """Wait until all nodes are there; the address and the port at which node 0 will listen.

    They meet in the attempt's folder, which all nodes see: no port needs to be agreed on before.

    Raises:
        TimeoutError: names the hosts that did not come.
        UserError: no port, or no way to the other nodes.
    """
    deadline = time.monotonic() + seconds
    place = folder / "rendezvous.json"
    while time.monotonic() < deadline:
        # Listing a folder makes a network file system look again.
        there = {each.name for each in folder.iterdir()}
        if place.name in there:
            found = read_json(place, {"address": str, "port": int})
            return found["address"], found["port"]
        if index == 0 and not missing_hosts(folder, hosts):
            found = {"address": address_towards(hosts[1]), "port": free_port()}
            storage.write(place, json.dumps(found))
        time.sleep(_POLL_SECONDS)
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
    """Leave the mark of a node that has started."""
    (folder / f"node_{index}").touch()


def missing_hosts(folder: Path, hosts: Sequence[str]) -> list[str]:
    """The hosts of the nodes that have left no mark."""
    there = {each.name for each in folder.iterdir()}
    return [host for i, host in enumerate(hosts) if f"node_{i}" not in there]
