"""Collectives over all ranks, and the links between hosts: are they right, and how fast?"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from neftune_dist.cluster.doctor.findings import (
    OK,
    WARNING,
    WRONG,
    Finding,
    error_text,
    named,
    within,
)
from neftune_dist.cluster.doctor.ranks import Ranks
from neftune_dist.system.network import use_interface_towards

if TYPE_CHECKING:
    import torch

_SECONDS = 120.0
_GRACE_SECONDS = 6.0
_PROBE_MIB = {"cuda": 64, "cpu": 8}
_NUM_ROUNDS = 5
_SLOW_LINK = 0.5  # of the median
_NETWORK = (
    "check the network between hosts; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface"
)
_BROKEN = "a GPU, a link or a library is broken: leave this host out, and see NCCL_DEBUG=INFO"


def check_collectives(ranks: Ranks) -> tuple[list[Finding], bool]:
    """Whether all_reduce, all_gather and reduce_scatter are right on every rank, and how fast.

    All ranks call it together, once all are here. On GPUs the collectives run over NCCL, and one
    small sum over gloo as well, which checkpoints need.

    Returns:
        On rank 0 the findings; and whether native code was left behind that only `os._exit` ends.
    """
    mailbox = ranks.mailbox
    began, result, left_behind = time.monotonic(), dict[str, Any](), True
    try:
        # The others would wait in vain for a rank that failed.
        failed = lambda: mailbox.store.check(["failed"])  # noqa: E731
        result, left_behind = within(_SECONDS, lambda: _exercise(ranks), failed), False
    except TimeoutError:
        result["stuck"] = time.monotonic() - began
    except Exception as error:  # the process group raises a dozen unrelated types
        result["error"] = error_text(error)
        mailbox.store.set("failed", "")
    mailbox.post("collectives", result)
    if ranks.place.rank:
        return [], left_behind
    # Once a rank has failed or waited in vain, the others do not take much longer.
    left = 0.0 if left_behind else _SECONDS - (time.monotonic() - began)
    results = mailbox.collect("collectives", ranks.host_of, left + _GRACE_SECONDS)
    return list(_judge(results, ranks.host_of)), left_behind


def _exercise(ranks: Ranks) -> dict[str, Any]:
    """Use collectives in the world of a run: those that are wrong on this rank, and their times."""
    import torch
    import torch.distributed as dist

    from neftune_dist.distributed.world import World

    place = ranks.place
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    other = next((host for host in ranks.firsts if host != ranks.host), None)
    if other and "SLURM_STEP_ID" in os.environ:
        use_interface_towards(other)
    store: Any = ranks.mailbox.store  # which answers one thread at a time
    world = World(store=store.clone())
    wrong, seconds = _measure_collectives(world.device, place.rank, place.size)
    if world.device.type == "cuda":
        one = torch.ones(1)
        dist.all_reduce(one, group=dist.new_group(backend="gloo"))
        wrong += [] if one.item() == place.size else ["all_reduce over gloo"]
    links = _measure_links(world.device, place.rank, ranks.firsts)
    dist.barrier()
    dist.destroy_process_group()
    return {"device": world.device.type, "wrong": wrong, "seconds": seconds, "links": links}


def _measure_collectives(
    device: torch.device, rank: int, size: int
) -> tuple[list[str], dict[str, float]]:
    """Collectives that are wrong here, and the median seconds of each.

    The numbers are whole and small, so that their sums are exact in float32 in any order.
    """
    import torch
    import torch.distributed as dist

    per_rank = _PROBE_MIB[device.type] * 2**20 // 4 // size
    base = torch.arange(per_rank * size, device=device).remainder(97).float()
    total = base * size + size * (size - 1) / 2
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    ranks = torch.arange(size, device=device).repeat_interleave(per_rank)
    whole, part = torch.empty_like(base), torch.empty_like(base[mine])
    # Name: the call, the tensor that it fills, the right values.
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


def _finish(device: torch.device) -> None:
    """Wait for the work that was given to a GPU."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure_links(device: torch.device, rank: int, firsts: Mapping[str, int]) -> dict[str, float]:
    """GB/s from each host to the next, one link at a time; those that end at this rank."""
    import torch
    import torch.distributed as dist

    ring = list(firsts.items())
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


def _judge(
    results: Mapping[int, Mapping[str, Any]], host_of: Mapping[int, str]
) -> Iterator[Finding]:
    """Rank 0's findings from the results of all ranks."""

    def wrong(ranks: Iterable[int], text: str, fix: str = _NETWORK) -> Finding:
        hosts = tuple(dict.fromkeys(host_of[rank] for rank in ranks))
        who = f"rank {named([str(rank) for rank in ranks])} ({named(hosts)})"
        return Finding(WRONG, "collectives", text.replace("{who}", who), fix, hosts)

    failed = {rank: result["error"] for rank, result in results.items() if "error" in result}
    stuck = {rank: result["stuck"] for rank, result in results.items() if "stuck" in result}
    silent = [rank for rank in host_of if rank not in results]
    for error in dict.fromkeys(failed.values()):
        yield wrong([rank for rank in failed if failed[rank] == error], "{who}: " + error)
    if silent:
        yield wrong(silent, "{who} went away")
    if stuck and not failed and not silent:
        yield wrong(list(stuck), f"{{who}} got no answer within {max(stuck.values()):.0f} seconds")
    if failed or stuck or silent:
        return
    broken = dict.fromkeys(name for result in results.values() for name in result["wrong"])
    for name in broken:
        ranks = [rank for rank, result in results.items() if name in result["wrong"]]
        yield wrong(ranks, f"{name} is wrong on {{who}}", _BROKEN)
    if not broken:
        yield _speeds(results)
    links = {link: speed for result in results.values() for link, speed in result["links"].items()}
    if links:
        yield from _judge_links(links)


def _speeds(results: Mapping[int, Mapping[str, Any]]) -> Finding:
    device, number = results[0]["device"], len(results)
    text = f"right sums, {number} rank{'s' if number > 1 else ''} on {device}"
    if number > 1:
        # NCCL's tests call it algorithm bandwidth: bytes of the whole tensor over the time.
        mib = _PROBE_MIB[device]
        slowest = {
            name: max(result["seconds"][name] for result in results.values())
            for name in results[0]["seconds"]
        }
        speeds = [f"{name} {mib * 2**20 / 1e9 / taken:.2f}" for name, taken in slowest.items()]
        text += f": {', '.join(speeds)} GB/s ({mib} MiB / the slowest rank's time)"
    return Finding(OK, "collectives", text)


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
