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

from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import (
    StaticTCPRendezvous,
    create_rdzv_handler,
)
from torch.distributed.run import main

from neftune_dist.system.network import free_port

LOOPBACK = "127.0.0.1"
_BACKEND = "neftune_dist"


def torchrun(words: Sequence[str], address: str = LOOPBACK, port: int = 0, index: int = 0) -> None:
    """Run torchrun in this process.

    Args:
        words: of torchrun's command line, without any about the rendezvous.
        address: where node 0 listens.
        port: where node 0 listens; 0: a free one.
        index: of this node.
    """
    rendezvous_handler_registry.register(_BACKEND, _create)
    rendezvous = [
        f"--rdzv-backend={_BACKEND}",
        f"--rdzv-endpoint={address}:{port or free_port()}",
        f"--rdzv-conf=rank={index}",
    ]
    main([*rendezvous, *words])


class _AtOneAddress(StaticTCPRendezvous):
    def get_backend(self) -> str:
        return _BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        if not self._store:
            listening = _listen(self.master_addr, self.master_port) if self.rank == 0 else None
            self._store = TCPStore(
                self.master_addr,
                self.master_port,
                self.world_size,
                self.rank == 0,
                self.timeout,
                multi_tenant=True,
                master_listen_fd=listening,
            )
        info = RendezvousStoreInfo(self.master_addr, self.master_port)
        return RendezvousInfo(
            PrefixStore(self.run_id, self._store), self.rank, self.world_size, info
        )


def _listen(address: str, port: int) -> int:
    """The descriptor of a socket that listens there."""
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address, port), family=family, backlog=2048).detach()


def _create(params: RendezvousParameters) -> RendezvousHandler:
    # The endpoint, the node's rank and the timeout are read as torch reads them.
    usual = create_rdzv_handler(params)
    assert isinstance(usual, StaticTCPRendezvous)
    return _AtOneAddress(
        usual.master_addr,
        usual.master_port,
        int(usual.rank),  # text, of a backend that torch does not know
        usual.world_size,
        usual.run_id,
        int(usual.timeout.total_seconds()),
    )


if __name__ == "__main__":
    torchrun(sys.argv[1:])
