"""How nodes find each other, each a thread that sees the same folder."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from neftune_dist.cluster.launch import rendezvous, torchrun
from neftune_dist.config import UserError
from neftune_dist.system import network

HOSTS = ("127.0.0.1", "localhost", "127.0.0.3")


def test_all_nodes_get_the_address_of_the_first(tmp_path: Path) -> None:
    def node(index: int) -> tuple[str, int]:
        time.sleep(0.1 * index)
        rendezvous.arrive(tmp_path, index)
        return rendezvous.meet(tmp_path, HOSTS, index, 20)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(node, range(3)))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == "127.0.0.1"
    with socket.socket() as server:
        server.bind(found[0])


def test_missing_nodes_are_named(tmp_path: Path) -> None:
    rendezvous.arrive(tmp_path, 0)
    with pytest.raises(TimeoutError, match=r"^localhost, 127\.0\.0\.3 did not come within 0\.005"):
        rendezvous.meet(tmp_path, HOSTS, 0, 0.3)
    rendezvous.arrive(tmp_path, 1)
    waiting = r"^127\.0\.0\.1, which starts .*; not there: 127\.0\.0\.3$"
    with pytest.raises(TimeoutError, match=waiting):
        rendezvous.meet(tmp_path, HOSTS, 1, 0.3)


def test_free_port_is_unused_or_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert network.free_port() in range(20000, 32000)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT={port} is taken on "):
            network.free_port()
        monkeypatch.delenv("MASTER_PORT")
        monkeypatch.setattr(network, "_PORTS", [port] * 200)
        with pytest.raises(UserError, match="No free port"):
            network.free_port()
    monkeypatch.setenv("MASTER_PORT", str(port))
    assert network.free_port() == port
    for wrong in ("high", "0", "65536", "99999999999999999999", "٣٣٣٣"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        with pytest.raises(UserError, match=f"MASTER_PORT={wrong} is no port"):
            network.free_port()


def test_interface_that_leads_to_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    network.use_interface_towards("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"  # what the user has set stays
    assert network.interface_of("203.0.113.7") is None
    assert network.interface_of("::1") == "lo"
    with pytest.raises(UserError, match=r"cannot find nowhere\.invalid"):
        network.address_towards("nowhere.invalid")


def test_store_listens_at_one_address() -> None:
    """Not on every interface, as torch lets it: whoever reaches it can change what ranks agree."""
    ours = torchrun.listen("127.0.0.1", 0)
    port = ours.port
    # As torchrun makes it.
    store = StaticTCPRendezvous("127.0.0.1", port, 0, 1, "none", 60).next_rendezvous().store
    store.set("a", "b")
    assert ours.get("none/a") == b"b"
    listening = [
        address
        for table in ("tcp", "tcp6")
        for _, address, _, state, *_ in map(
            str.split, Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        )
        if state == "0A" and address.endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]
