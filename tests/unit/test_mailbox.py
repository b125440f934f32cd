"""Messages of ranks over the rendezvous store; each rank has its own connection."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from neftune_dist.distributed.environment import Place
from neftune_dist.distributed.mailbox import Mailbox, connect, pauses, wait_until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def place(rank: int, port: int, size: int = 3) -> Place:
    return Place(rank, size, rank, size, "127.0.0.1", port)


@pytest.mark.parametrize("num_ranks", [1, 2, 64, 512, 2048, 16384])
def test_all_ranks_together_ask_at_most_5000_times_a_second(num_ranks: int) -> None:
    made = list(itertools.islice(pauses(num_ranks), 100))
    questions, requests = 2, 5000
    if num_ranks >= 64:
        assert all(num_ranks * questions / pause <= requests * 1.001 for pause in made)
    else:
        assert made[0] <= 0.01 and made[-1] <= 0.05  # few ranks hear of each other at once
    assert made == sorted(made)


def test_waiting_ends_with_the_condition_or_with_the_time() -> None:
    answers = iter([False, False, True])
    assert wait_until(lambda: next(answers), 1, 5.0)
    began = time.monotonic()
    assert not wait_until(lambda: False, 512, 0.1)  # a pause longer than the time is cut short
    assert 0.1 <= time.monotonic() - began < 0.19


def test_posts_of_ranks_are_collected_and_late_ones_left_out() -> None:
    port = free_port()
    stores = [connect(place(rank, port), 5.0) for rank in range(2)]
    first, second = (Mailbox(store, rank, 3) for rank, store in enumerate(stores))
    threading.Timer(0.2, second.post, ["load", {"gib": [1, 2]}]).start()
    first.post("load", None)
    assert first.collect("load", range(3), 1.0) == {0: None, 1: {"gib": [1, 2]}}
    assert second.read("load", 0, 1.0) is None
    with pytest.raises(TimeoutError, match="rank 2 did not answer"):
        first.read("load", 2, 0.1)


def test_connecting_does_not_wait_for_the_other_ranks() -> None:
    port = free_port()
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(connect, place(1, port), 20.0)
        time.sleep(0.3)
        store = connect(place(0, port), 5.0)
        store.set("key", "value")
        assert late.result(20).get("key") == b"value"


def test_ranks_of_torchrun_use_the_agents_store(monkeypatch: pytest.MonkeyPatch) -> None:
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    connect(place(0, agent.port), 5.0).set("key", "rank 0's")
    assert connect(place(1, agent.port), 5.0).get("key") == b"rank 0's"


def test_rank_0_that_never_listens_is_named() -> None:
    port = free_port()
    with pytest.raises(TimeoutError, match=f"127.0.0.1:{port}.*refused"):
        connect(place(1, port), 0.5)


def test_one_rank_needs_no_network() -> None:
    assert isinstance(connect(Place(), 0.1), dist.HashStore)
