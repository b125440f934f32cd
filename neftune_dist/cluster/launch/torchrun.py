"""torchrun, whose rendezvous store listens at one address instead of on every interface.

The store has no password: whoever reaches it can read and change what the ranks tell each other.
torch lets it listen everywhere, on one node too. Here it gets a socket that is bound to the address
by which the ranks reach it: loopback on one node, else that of the interface between the nodes.

    python -m neftune_dist.cluster.launch.torchrun --nproc-per-node=2 -m neftune_dist train ...
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Sequence

from torch.distributed import TCPStore
from torch.distributed.run import main

LOOPBACK = "127.0.0.1"


def torchrun(words: Sequence[str], address: str = LOOPBACK, port: int = 0, index: int = 0) -> None:
    """Run torchrun in this process.

    Args:
        words: of torchrun's command line, without any about the rendezvous.
        address: where node 0 listens.
        port: where node 0 listens; 0, on one node: a free one.
        index: of this node.
    """
    if index == 0:
        store = listen(address, port)  # held here: it ends with its last reference
        port = store.port
    main([f"--master-addr={address}", f"--master-port={port}", f"--node-rank={index}", *words])


def listen(address: str, port: int) -> TCPStore:
    """Let the rendezvous store listen at one address.

    torchrun makes a store for the same port, multi-tenant, too: in one process those share a
    server.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    listening = socket.create_server((address, port), family=family, backlog=2048)
    return TCPStore(
        address,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listening.detach(),
    )


if __name__ == "__main__":
    torchrun(sys.argv[1:])
