"""Ranks that wait for the last one at the rendezvous store: their requests, and their release.

    python tests/benchmarks/waiting_ranks.py [NUM_RANKS ...]

A store in one process; in others NUM_RANKS clients (default: 512 and 2048), each a thread; more
than 512 share as many connections, since one takes 0.16 s to make here. All wait SECONDS for one
rank that comes last. `before`: 20 questions a second of 3 requests each, as `World.agree` once did;
`now`: `mailbox.pauses`. Latency is that of the last rank's own request while the others wait;
release is the time from its arrival until the last of the others goes on.

Measured on 2 shared cores, torch 2.13.0, 2026-11-26:

    ranks  mode     requests/s  latency, ms  at most  release, s  store's CPU
      512  before       24,779          1.8     23.0        0.08         45 %
      512  now           5,017          0.1      3.7        0.13         25 %
    2,048  before       23,394         25.2     69.0        0.70         48 %
    2,048  now           4,972          0.2     36.2        0.99         22 %

`before` asks 30,720 times a second with 512 ranks and 122,880 with 2,048; the store answers some
24,000 of these here, beside the clients on the same cores. `now` stays at its 5,000 for any number
of ranks, and a rank's own request is answered at once.
"""

from __future__ import annotations

import multiprocessing as mp
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.synchronize import Barrier

import torch.distributed as dist

from neftune_dist.distributed.mailbox import pauses

SECONDS = 8.0
NUM_PROCESSES, NUM_CONNECTIONS = 4, 128  # connections of a process
MODES = {"before": 3, "now": 2}  # requests of a question


def _every_50_ms(_: int) -> Iterator[float]:
    while True:
        yield 0.05


def _connect(port: int, is_host: bool = False) -> dist.TCPStore:
    return dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=is_host,
        timeout=timedelta(seconds=300),
        wait_for_workers=False,
    )


def _serve(port: mp.Queue, done: mp.Event) -> None:  # type: ignore[type-arg, valid-type]
    store = _connect(0, is_host=True)
    port.put(store.port)
    done.wait()  # type: ignore[attr-defined]
    times = time.process_time()
    port.put(times)


def _wait(port: int, mode: str, number: int, num_ranks: int, ready: Barrier, out: mp.Queue) -> None:  # type: ignore[type-arg]
    with ThreadPoolExecutor(16) as pool:
        stores = list(pool.map(lambda _: _connect(port), range(min(number, NUM_CONNECTIONS))))
    ready.wait()
    asked, freed = [0] * number, [0.0] * number

    def rank(i: int) -> None:
        store = stores[i % len(stores)]
        for pause in (pauses if mode == "now" else _every_50_ms)(num_ranks):
            over = store.check([f"{mode}/over"])
            for _ in range(MODES[mode] - 1):
                store.check([f"{mode}/stopped"])
            asked[i] += MODES[mode]
            if over:
                freed[i] = time.time()
                return
            time.sleep(pause)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    out.put((sum(asked), max(freed)))


def measure(mode: str, num_ranks: int) -> str:
    """One line of the table."""
    ports: mp.Queue = mp.Queue()  # type: ignore[type-arg]
    out: mp.Queue = mp.Queue()  # type: ignore[type-arg]
    done, ready = mp.Event(), mp.Barrier(NUM_PROCESSES + 1)
    server = mp.Process(target=_serve, args=(ports, done))
    server.start()
    port = ports.get()
    number = num_ranks // NUM_PROCESSES
    args = (port, mode, number, num_ranks, ready, out)
    clients = [mp.Process(target=_wait, args=args) for _ in range(NUM_PROCESSES)]
    for client in clients:
        client.start()
    last = _connect(port)
    ready.wait()
    began, latencies = time.time(), []
    while time.time() - began < SECONDS:
        asked = time.time()
        last.check(["none"])
        latencies.append(time.time() - asked)
        time.sleep(0.1)
    arrived = time.time()
    last.set(f"{mode}/over", "")
    results = [out.get() for _ in clients]
    seconds = max(freed for _, freed in results) - began
    for client in clients:
        client.join()
    done.set()
    cpu = ports.get()
    server.join()
    latencies.sort()
    return (
        f"{num_ranks:6} {mode:7} {sum(n for n, _ in results) / seconds:10.0f} requests/s"
        f"  latency {1000 * latencies[len(latencies) // 2]:7.1f} ms, at most "
        f"{1000 * latencies[-1]:7.1f}  release {max(f for _, f in results) - arrived:6.2f} s"
        f"  store's CPU {cpu / seconds:4.0%}"
    )


if __name__ == "__main__":
    mp.set_start_method("spawn")
    for ranks in [int(word) for word in sys.argv[1:]] or [512, 2048]:
        for kind in MODES:
            print(measure(kind, ranks), flush=True)
