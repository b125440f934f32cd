"""Collectives over all ranks, in the world of a run: are they right, and how fast?"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from neftune_dist.cluster.doctor.findings import OK, WRONG, Finding, error_text, named, within
from neftune_dist.cluster.doctor.ranks import Ranks
from neftune_dist.system.network import use_interface_towards

_SECONDS = 120.0
_GRACE_SECONDS = 6.0
_PROBE_MIB = {"cuda": 64, "cpu": 8}
_NUM_ROUNDS = 5
_FIX = (
    "check the network between hosts (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the "
    "interface) and see NCCL_DEBUG=INFO; where sums are wrong a GPU, a link or a library is "
    "broken: leave the host out"
)
_LATE = "got no answer"


def check_collectives(ranks: Ranks) -> Iterator[Finding]:
    """Check all_reduce, all_gather and reduce_scatter on every rank, and time them.

    All ranks call it together, once all are here. On GPUs the collectives run over NCCL, and one
    small sum over gloo as well, which checkpoints need.
    """
    began = time.monotonic()
    try:
        result = within(_SECONDS, lambda: _exercise(ranks))
    except TimeoutError:
        result = {"error": f"{_LATE} within {_SECONDS:.0f} seconds"}
    except Exception as error:  # the process group raises a dozen unrelated types
        result = {"error": error_text(error)}
    left = max(0.0, began + _SECONDS - time.monotonic()) + _GRACE_SECONDS
    return _judge(ranks.gather("collectives", result, left), ranks.host_of)


def _exercise(ranks: Ranks) -> dict[str, Any]:
    """Use collectives: the error of those that are wrong on this rank, or the seconds of each."""
    import torch
    import torch.distributed as dist

    from neftune_dist.distributed.world import World

    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    here = ranks.host_of[ranks.place.rank]
    other = next((host for host in ranks.firsts if host != here), None)
    if other and "SLURM_STEP_ID" in os.environ:
        use_interface_towards(other)
    store: Any = ranks.mailbox.store  # which answers one thread at a time
    world = World(store=store.clone())
    on_gpu = world.device.type == "cuda"
    wrong, seconds = _measure(world, torch.cuda.synchronize if on_gpu else lambda: None)
    if on_gpu:
        one = torch.ones(1)
        dist.all_reduce(one, group=dist.new_group(backend="gloo"))
        wrong += [] if one.item() == world.size else ["all_reduce over gloo"]
    dist.barrier()
    dist.destroy_process_group()
    if wrong:
        return {"error": f"wrong result of {' and '.join(wrong)}"}
    return {"device": world.device.type, "seconds": seconds}


def _measure(world: Any, finish: Callable[[], None]) -> tuple[list[str], dict[str, float]]:
    """Collectives that are wrong here, and the least seconds of each.

    The numbers are whole and small, so that their sums are exact in float32 in any order.
    """
    import torch
    import torch.distributed as dist

    device, rank, size = world.device, world.rank, world.size
    per_rank = _PROBE_MIB[device.type] * 2**20 // 4 // size
    base = torch.arange(per_rank * size, device=device).remainder(97).float()
    total = base * size + size * (size - 1) / 2
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    owners = torch.arange(size, device=device).repeat_interleave(per_rank)
    whole, part = torch.empty_like(base), torch.empty_like(base[mine])
    gathered = base[:per_rank].repeat(size) + owners
    # Name: the call, the tensor that it fills, the right values.
    operations: dict[str, tuple[Callable[[], object], Any, Any]] = {
        "all_reduce": (lambda: dist.all_reduce(whole), whole, total),
        "all_gather": (
            lambda: dist.all_gather_into_tensor(whole, base[:per_rank] + rank),
            whole,
            gathered,
        ),
        "reduce_scatter": (
            lambda: dist.reduce_scatter_tensor(part, base + rank),
            part,
            total[mine],
        ),
    }
    wrong, seconds = dict[str, bool](), dict[str, float]()
    for name, (call, filled, expected) in operations.items():
        for _ in range(_NUM_ROUNDS):
            whole.copy_(base + rank)
            finish()
            began = time.perf_counter()
            call()
            finish()
            taken = time.perf_counter() - began
            seconds[name] = min(taken, seconds.get(name, taken))
            wrong[name] = wrong.get(name, False) or not torch.equal(filled, expected)
    return [name for name in wrong if wrong[name]], seconds


def _judge(
    results: Mapping[int, Mapping[str, Any]], host_of: Mapping[int, str]
) -> Iterator[Finding]:
    """The findings from the results of all ranks."""
    problems: dict[str, list[int]] = {}
    for rank in host_of:
        text = results[rank].get("error") if rank in results else "went away"
        if text:
            problems.setdefault(text, []).append(rank)
    # Ranks that wait in vain do so because of the others, if there are others.
    causes = [text for text in problems if not text.startswith(_LATE)] or [*problems]
    for text in causes:
        hosts = tuple(dict.fromkeys(host_of[rank] for rank in problems[text]))
        who = f"rank {named([str(rank) for rank in problems[text]])} ({named(hosts)})"
        yield Finding(WRONG, "collectives", f"{who}: {text}", _FIX, hosts)
    if problems:
        return
    device, number = results[0]["device"], len(results)
    text = f"right sums, {number} rank{'s' if number > 1 else ''} on {device}"
    if number > 1:
        # NCCL's tests call it algorithm bandwidth: bytes of the whole tensor over the time.
        mib = _PROBE_MIB[device]
        speeds = []
        for name in results[0]["seconds"]:
            slowest = max(result["seconds"][name] for result in results.values())
            speeds.append(f"{name} {mib * 2**20 / 1e9 / slowest:.2f}")
        text += f": {', '.join(speeds)} GB/s ({mib} MiB / the slowest rank's time)"
    yield Finding(OK, "collectives", text)
