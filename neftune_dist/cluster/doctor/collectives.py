"""Collectives over all ranks, and the links between hosts: are they right, and how fast?"""

from __future__ import annotations

import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from neftune_dist.cluster.doctor.findings import OK, WARNING, WRONG, Finding, named, told
from neftune_dist.cluster.doctor.meeting import Meeting, Place, Roll
from neftune_dist.system.network import use_interface_towards

_SECONDS = 120.0
_GRACE_SECONDS = 3.0
_PROBE_MIB = {"cuda": 64, "cpu": 8}
_NUM_ROUNDS = 5
_SLOW_LINK = 0.5  # of the median
_NETWORK = (
    "check the network between hosts; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface"
)


def check_collectives(meeting: Meeting, roll: Roll) -> tuple[list[Finding], bool]:
    """Whether all_reduce, all_gather and reduce_scatter are right on every rank, and how fast.

    To be called by all ranks, once all are there. On GPUs they run over NCCL, and one small sum
    over gloo as well, by which checkpoints agree.

    Returns:
        On rank 0 the findings; and whether the process group was left behind, whose native code
        nothing but `os._exit` ends for sure.
    """
    place, mine = meeting.place, dict[str, Any]()
    store = meeting.store.clone()  # a store answers one question at a time: the thread has its own

    def work() -> None:
        try:
            mine.update(_exercise(store, place, roll))
        except Exception as error:  # the process group raises a dozen unrelated types
            mine["error"] = told(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    began = time.monotonic()
    deadline = began + _SECONDS
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.05)
        if meeting.store.check(["failed"]):  # the others would wait in vain for that rank
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    stuck = thread.is_alive()
    result = {"stuck": time.monotonic() - began} if stuck else mine
    if "error" in result:
        meeting.store.set("failed", "")
    meeting.say("collectives", result)
    left_behind = stuck or "error" in mine
    if place.rank != 0:
        return [], left_behind
    patience = max(0.0, deadline - time.monotonic()) + 2 * _GRACE_SECONDS
    return list(_judge(meeting.collect("collectives", roll.host_of, patience), roll)), left_behind


def _exercise(store: Any, place: Place, roll: Roll) -> dict[str, Any]:
    """Form the process group and use it: what is wrong on this rank, and seconds taken."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda and place.local_rank >= torch.cuda.device_count():
        raise ValueError(f"it is number {place.local_rank} of {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    if place.of_slurm:
        away = next((host for host in roll.firsts if host != place.host), None)
        if away:
            use_interface_towards(away)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=place.rank,
        world_size=place.size,
        # Later than this check's own patience, which says more.
        timeout=timedelta(seconds=2 * _SECONDS),
        device_id=device if cuda else None,
    )
    wrong, seconds = _measure_collectives(device, place)
    if cuda:
        one = torch.ones(1)
        dist.all_reduce(one, group=dist.new_group(backend="gloo"))
        wrong += [] if one.item() == place.size else ["all_reduce over gloo"]
    links = _measure_links(device, place.rank, roll)
    dist.barrier()
    dist.destroy_process_group()
    return {"device": device.type, "wrong": wrong, "seconds": seconds, "links": links}


def _measure_collectives(device: Any, place: Place) -> tuple[list[str], dict[str, float]]:
    """Collectives that are wrong here, and the median seconds of each.

    The numbers are whole and small, so that their sums are exact in float32 in any order.
    """
    import torch
    import torch.distributed as dist

    size, rank = place.size, place.rank
    per_rank = _PROBE_MIB[device.type] * 2**20 // 4 // size
    base = torch.arange(per_rank * size, device=device).remainder(97).float()
    total = base * size + size * (size - 1) / 2
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    ranks = torch.arange(size, device=device).repeat_interleave(per_rank)
    whole, part = torch.empty_like(base), torch.empty_like(base[mine])
    # Name: what to call, the tensor that it fills, what must be there.
    operations: dict[str, tuple[Callable[[], object], Any, Any]] = {
        "all_reduce": (lambda: dist.all_reduce(whole), whole, total),
        "all_gather": (
            lambda: dist.all_gather_into_tensor(whole, base[:per_rank] + rank),
            whole,
            base[:per_rank].repeat(size) + ranks,
        ),
        "reduce_scatter": (
            lambda: dist.reduce_scatter_tensor(part, base + rank),
            part,
            total[mine],
        ),
    }
    wrong, seconds = [], {}
    for name, (call, filled, expected) in operations.items():
        times = []
        for _ in range(_NUM_ROUNDS):
            whole.copy_(base + rank)
            _finish(device)
            began = time.perf_counter()
            call()
            _finish(device)
            times.append(time.perf_counter() - began)
            if not torch.equal(filled, expected) and name not in wrong:
                wrong.append(name)
        seconds[name] = statistics.median(times[1:])  # the first makes the connections
    return wrong, seconds


def _finish(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_links(device: Any, rank: int, roll: Roll) -> dict[str, float]:
    """GB/s from each host to the next, one link at a time; those that end at this rank."""
    import torch
    import torch.distributed as dist

    ring = [(host, first) for host, first in roll.firsts.items()]
    block = torch.zeros(_PROBE_MIB[device.type] * 2**20 // 4, device=device)
    speeds = {}
    for i in range(len(ring) if len(ring) > 1 else 0):
        (host, sender), (next_host, receiver) = ring[i], ring[(i + 1) % len(ring)]
        if rank == sender:
            for _ in range(_NUM_ROUNDS):
                dist.send(block, receiver)
            _finish(device)
        elif rank == receiver:
            dist.recv(block, sender)  # makes the connection, and waits for the sender's turn
            _finish(device)
            began = time.perf_counter()
            for _ in range(_NUM_ROUNDS - 1):
                dist.recv(block, sender)
            _finish(device)
            taken = time.perf_counter() - began
            speeds[f"{host} to {next_host}"] = block.nbytes * (_NUM_ROUNDS - 1) / taken / 1e9
    return speeds


def _judge(results: dict[int, dict[str, Any]], roll: Roll) -> Iterator[Finding]:
    """Rank 0's findings from what all ranks measured."""
    failed = {rank: each["error"] for rank, each in results.items() if "error" in each}
    stuck = [rank for rank, each in results.items() if "stuck" in each]
    silent = [rank for rank in roll.host_of if rank not in results]

    def wrong(ranks: list[int], text: str, mend: str = _NETWORK) -> Finding:
        hosts = tuple(dict.fromkeys(roll.host_of[rank] for rank in ranks))
        who = f"rank {named([str(rank) for rank in ranks])} ({named(hosts)})"
        return Finding(WRONG, "collectives", text.replace("{who}", who), mend, hosts)

    for error in dict.fromkeys(failed.values()):
        ranks = [rank for rank, each in failed.items() if each == error]
        yield wrong(ranks, "{who}: " + error)
    if silent:
        yield wrong(silent, "{who} went away")
    if stuck and not failed and not silent:
        seconds = max(results[rank]["stuck"] for rank in stuck)
        yield wrong(stuck, f"{{who}} got no answer within {seconds:.0f} seconds")
    if failed or stuck or silent:
        return
    broken = "a GPU, a link or a library is broken: leave this host out, and see NCCL_DEBUG=INFO"
    for name in dict.fromkeys(name for each in results.values() for name in each["wrong"]):
        ranks = [rank for rank, each in results.items() if name in each["wrong"]]
        yield wrong(ranks, f"{name} is wrong on {{who}}", broken)
    device = results[0]["device"]
    mib = _PROBE_MIB[device]
    text = f"{len(results)} rank{'s' if len(results) > 1 else ''} on {device}"
    if not any(each["wrong"] for each in results.values()):
        speeds = ", ".join(
            f"{name} {mib * 2**20 / 1e9 / max(e['seconds'][name] for e in results.values()):.2f}"
            for name in results[0]["seconds"]
        )
        # What NCCL's tests call algorithm bandwidth: bytes of the whole tensor over the time.
        speeds = (
            f": {speeds} GB/s ({mib} MiB / the slowest rank's time)" if len(results) > 1 else ""
        )
        yield Finding(OK, "collectives", f"right sums, {text}{speeds}")
    links = {link: speed for each in results.values() for link, speed in each["links"].items()}
    if links:
        yield from _judge_links(links)


def _judge_links(links: dict[str, float]) -> Iterator[Finding]:
    median = statistics.median(links.values())
    slow = {link: speed for link, speed in links.items() if speed < _SLOW_LINK * median}
    for link, speed in slow.items():
        seen = f"{link} {speed:.2f} GB/s, the median is {median:.2f}"
        yield Finding(
            WARNING, "host links", seen, "check its cable, card and driver, or leave it out"
        )
    if not slow:
        seen = f"{min(links.values()):.2f} to {max(links.values()):.2f} GB/s from host to host"
        yield Finding(OK, "host links", seen)
