"""The place of a process among the others, as its launcher wrote it into the environment.

Reads torchrun's variables and numbers in Slurm's. Incomplete or contradictory ones are refused
before anything waits for ranks that will not come. Imports no torch.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import time
from dataclasses import dataclass

from neftune_dist.config import UserError

# Names of machines that are still starting may become known late.
_RESOLVE_SECONDS = 10.0
_REST = "unset it, or start the processes with torchrun or neftune-dist launch, which set all."


@dataclass(frozen=True)
class Place:
    """This process among those that were started together.

    Attributes:
        rank: index of this process.
        size: number of all processes.
        local_rank: index of this process on its machine.
        local_size: number of processes on this machine.
        address: where rank 0 listens; empty for a process alone.
        port: where rank 0 listens; 0 for a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str = ""
    port: int = 0


def number(name: str, usual: int, least: int = 0) -> int:
    """Read a whole number from the environment.

    Args:
        name: of the variable.
        usual: the result where it is not set.
        least: the smallest number that is allowed.

    Raises:
        UserError: it is no such number.
    """
    text = os.environ.get(name)
    if text is None:
        return usual
    if not (text.isascii() and text.isdecimal() and least <= int(text[:20]) < 2**63):
        raise UserError(
            f"The environment variable {name}={text!r} is no whole number from {least} on: {_REST}"
        )
    return int(text)


def find_place() -> Place:
    """This process's place, by torchrun's variables; alone where they are not set.

    Raises:
        UserError: they are set in part, contradict each other, or name an unknown machine.
    """
    size = number("WORLD_SIZE", 1, least=1)
    rank, local_rank = number("RANK", 0), number("LOCAL_RANK", 0)
    local_size = number("LOCAL_WORLD_SIZE", 1, least=1)
    needed = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
    missing = [name for name in needed if not os.environ.get(name)]
    together = size > 1 or rank > 0 or "MASTER_ADDR" in os.environ
    if together and missing:
        given = [f"{name}={os.environ[name]}" for name in needed if os.environ.get(name)]
        raise UserError(
            f"The environment says {' '.join(given) or 'MASTER_ADDR='} without "
            f"{', '.join(missing)}, which ranks need to meet: {_REST}"
        )
    checks = [("RANK", rank, "WORLD_SIZE", size)]
    if "LOCAL_WORLD_SIZE" in os.environ:
        checks += [("LOCAL_RANK", local_rank, "LOCAL_WORLD_SIZE", local_size)]
        checks += [("LOCAL_WORLD_SIZE", local_size, "WORLD_SIZE + 1", size + 1)]
    for name, value, limit, most in checks:
        if value >= most:
            raise UserError(
                f"The environment says {name}={value}, which must be less than {limit}={most}: "
                f"{_REST}"
            )
    if not together:
        return Place(local_rank=local_rank)
    port = number("MASTER_PORT", 0, least=1)
    if port > 65535:
        raise UserError(f"The environment variable MASTER_PORT={port} is no port: {_REST}")
    _check_address(os.environ["MASTER_ADDR"], port)
    return Place(rank, size, local_rank, local_size, os.environ["MASTER_ADDR"], port)


def expand_hosts(text: str) -> list[str]:
    """The names that Slurm means by "gpu[01-03,7]-ib,login"."""
    names: list[str] = []
    for name in re.findall(r"(?:[^,\[]|\[[\d,-]*\])+", text):
        parts = re.split(r"\[(.*?)\]", name)  # in turn text and what stands in brackets
        choices = [expand_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
        names += map("".join, itertools.product(*choices))
    return names


def expand_numbers(ranges: str) -> list[str]:
    """Of "08-10,3": 08, 09, 10, 3."""
    return [
        f"{i:0{len(first)}}"
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", ranges)
        for i in range(int(first), int(last or first) + 1)
    ]


def _check_address(address: str, port: int) -> None:
    """Raise `UserError` where the machine of rank 0 has a name that nobody knows: torch would look
    for it without end."""
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
            return
        except (OSError, UnicodeError) as error:
            if time.monotonic() > deadline or isinstance(error, UnicodeError):
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"The environment variable MASTER_ADDR={address} is no machine that is "
                    f"known here ({reason}): give the name or the address of rank 0's machine."
                ) from error
            time.sleep(0.5)
