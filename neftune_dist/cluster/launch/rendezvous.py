"""How the nodes of a job find each other: in the attempt's folder, which all of them see.

No port needs to be agreed on beforehand, so none is shared by two jobs; and the address is that of
the interface which leads to the other nodes, not what a host's own name happens to mean.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

from neftune_dist.config import UserError, read_json
from neftune_dist.system import storage

_POLL_SECONDS = 0.2
# Below the range from which the system takes ports for outgoing connections.
_PORTS = range(20000, 32000)


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


def free_port() -> int:
    """A port that nobody listens at; MASTER_PORT where it is set. Raises `UserError`."""
    given = os.environ.get("MASTER_PORT")
    if given and not given.isdecimal():
        raise UserError(f"MASTER_PORT={given} is no port.")
    for port in [int(given)] if given else random.sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    if given:
        raise UserError(
            f"MASTER_PORT={given} is taken on {socket.gethostname()}: unset it, and a free one is "
            "chosen."
        )
    raise UserError(f"No free port was found on {socket.gethostname()}.")


def address_towards(host: str) -> str:
    """The address of this machine from which it reaches `host`; nothing is sent.

    It is that of the right interface, which the machine's own name often is not.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot find {host} ({error.strerror or error}): is its name "
            "known on all nodes?"
        ) from error


def interface_towards(host: str) -> str | None:
    """The network interface by which this machine reaches `host`; None where it is not IPv4's."""
    return interface_of(address_towards(host))


def interface_of(address: str) -> str | None:
    """The name of the network interface that has `address` (IPv4); None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                request = struct.pack("256s", name.encode()[:15])
                reply = fcntl.ioctl(probe, 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    return None
