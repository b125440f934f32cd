"""Ports, addresses and network interfaces of this machine."""

from __future__ import annotations

import contextlib
import os
import random
import socket

import psutil

from neftune_dist.config import UserError

# Below the range from which the system takes ports for outgoing connections.
_PORTS = range(20000, 32000)


def free_port() -> int:
    """Return an unused port; MASTER_PORT where it is set.

    Raises:
        UserError: MASTER_PORT is no port or in use, or no port is free.
    """
    given = os.environ.get("MASTER_PORT")
    # int takes digits of other scripts, too, and bind takes 0 for a port that others do not know.
    if given and not (given.isascii() and given.isdecimal() and 0 < int(given[:6]) < 2**16):
        raise UserError(f"MASTER_PORT={given} is no port from 1 to 65535.")
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
    """Return the address from which this machine reaches `host`; nothing is sent.

    The machine's own name often resolves to another interface, such as loopback.
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


def use_interface_towards(host: str) -> None:
    """Have NCCL and gloo use the interface by which this machine reaches `host`.

    By themselves they take the interface of the machine's own name, which is often loopback.
    Variables that are set already stay.
    """
    interface = interface_of(address_towards(host))
    for library in ("NCCL", "GLOO"):
        if interface:
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)


def interface_of(address: str) -> str | None:
    """Return the name of the interface that has this address, or None."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return str(name)
    return None
