"""Checks that ranks make together: of the shared run directory, the clocks and the collectives.

All ranks call each check, in the same order, and get the same findings.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

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
from neftune_dist.system.storage import existing, sync

_WRITE_SECONDS = 60.0
_SEEN_SECONDS = 15.0  # network file systems may cache a folder's names for some seconds
_MOST_SKEW_SECONDS = 1.0
_NUM_CLOCK_ROUNDS = 4
_COLLECTIVES_SECONDS = 120.0
_GRACE_SECONDS = 6.0
_PROBE_MIB = {"cuda": 64, "cpu": 8}
_NUM_CALLS = 5
_FIX = (
    "check the network between hosts (GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the "
    "interface) and see NCCL_DEBUG=INFO; where sums are wrong a GPU, a link or a library is "
    "broken: leave the host out"
)
_LATE = "got no answer"


def check_shared(ranks: Ranks, run_dir: Path) -> Iterator[Finding]:
    """Check that each host sees the file of rank 0, and rank 0 the file of each host.

    The files are removed.
    """
    folder, name = existing(run_dir), ""
    with ExitStack() as files:
        if ranks.is_first:
            with suppress(OSError):  # the check of the run directory says that it cannot be written
                file = NamedTemporaryFile(dir=folder, prefix=".doctor-")  # noqa: SIM115
                name = Path(files.enter_context(file).name).name
                sync(folder)
        names = ranks.gather("written", name, _WRITE_SECONDS)
        written = {rank: name for rank, name in names.items() if name}
        mine = _seen(folder, written) if name else []
        seen = ranks.gather("seen", mine, 2 * _SEEN_SECONDS)
    if 0 in written and len(written) > 1:
        yield _shared(run_dir, ranks.host_of, [*written], seen)


def _seen(folder: Path, written: Mapping[int, str]) -> list[int]:
    """The ranks whose files appear in the folder before long."""
    deadline = time.monotonic() + _SEEN_SECONDS
    while True:
        # Listing a folder makes a network file system look again.
        names = {path.name for path in folder.glob("*")}
        seen = [rank for rank, name in written.items() if name in names]
        if len(seen) == len(written) or time.monotonic() > deadline:
            return seen
        time.sleep(0.05)


def _shared(
    run_dir: Path,
    host_of: Mapping[int, str],
    written: Sequence[int],
    seen: Mapping[int, Sequence[int]],
) -> Finding:
    first, others = host_of[0], [rank for rank in written if rank != 0]
    blind = [host_of[rank] for rank in others if 0 not in seen.get(rank, [])]
    unseen = [host_of[rank] for rank in others if rank not in seen.get(0, [])]
    problems = [f"{named(blind)} cannot see files of {first}"] if blind else []
    problems += [f"{first} cannot see files of {named(unseen)}"] if unseen else []
    if not problems:
        return Finding(OK, "shared run dir", f"{existing(run_dir)} is the same on all hosts")
    fix = "choose a directory on the cluster's shared file system"
    hosts = tuple(dict.fromkeys([*blind, *unseen]))
    text = f"run_dir={run_dir} is not shared: {'; '.join(problems)}"
    return Finding(WRONG, "shared run dir", text, fix, hosts)


def check_clocks(ranks: Ranks) -> Iterator[Finding]:
    """Compare each host's clock with that of rank 0's host.

    In each of a few rounds the hosts read their clocks when they hear from rank 0, later by the
    pause between two questions at most; the round with the least difference counts.
    """
    skews: dict[int, float] = {}
    for i in range(_NUM_CLOCK_ROUNDS):
        ranks.gather(f"ready {i}", None, _WRITE_SECONDS)
        clocks = ranks.gather(f"clock {i}", time.time(), _WRITE_SECONDS)
        for rank in ranks.firsts.values():
            skews[rank] = min(skews.get(rank, math.inf), clocks[rank] - clocks[0], key=abs)
    fix = "set the clocks by NTP (chronyd): logs, checkpoints and time-outs go by them"
    wrong = {rank: skew for rank, skew in skews.items() if abs(skew) > _MOST_SKEW_SECONDS}
    for rank, skew in wrong.items():
        seen = f"{abs(skew):.1f} seconds {'ahead of' if skew > 0 else 'behind'} {ranks.host_of[0]}"
        yield Finding(WARNING, "clock", seen, fix, (ranks.host_of[rank],))
    if not wrong:
        yield Finding(OK, "clock", f"at most {max(map(abs, skews.values())) * 1000:.0f} ms apart")


def check_collectives(ranks: Ranks) -> Iterator[Finding]:
    """Check all_reduce, all_gather and reduce_scatter on every rank, and time them.

    All ranks call it together, once all are here. On GPUs the collectives run over NCCL, and one
    small sum over gloo as well, which checkpoints need.
    """
    began = time.monotonic()
    try:
        result = within(_COLLECTIVES_SECONDS, lambda: _exercise(ranks))
    except TimeoutError:
        result = {"error": f"{_LATE} within {_COLLECTIVES_SECONDS:.0f} seconds"}
    except Exception as error:  # the process group raises a dozen unrelated types
        result = {"error": error_text(error)}
    left = max(0.0, began + _COLLECTIVES_SECONDS - time.monotonic()) + _GRACE_SECONDS
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
    given, part = base + rank, base[:per_rank] + rank
    total = base * size + size * (size - 1) / 2
    owners = torch.arange(size, device=device).repeat_interleave(per_rank)
    gathered = base[:per_rank].repeat(size) + owners
    own_total = total[rank * per_rank : (rank + 1) * per_rank]
    whole, filled_part = torch.empty_like(base), torch.empty_like(part)
    # Name: the call, the tensor that it fills, the right values.
    operations: dict[str, tuple[Callable[[], object], Any, Any]] = {
        "all_reduce": (lambda: dist.all_reduce(whole), whole, total),
        "all_gather": (lambda: dist.all_gather_into_tensor(whole, part), whole, gathered),
        "reduce_scatter": (
            lambda: dist.reduce_scatter_tensor(filled_part, given),
            filled_part,
            own_total,
        ),
    }
    wrong, seconds = list[str](), dict[str, float]()
    for name, (call, filled, expected) in operations.items():
        taken, is_right = list[float](), True
        for _ in range(_NUM_CALLS):
            whole.copy_(given)
            finish()
            began = time.perf_counter()
            call()
            finish()
            taken.append(time.perf_counter() - began)
            is_right = is_right and torch.equal(filled, expected)
        seconds[name] = min(taken)
        wrong += [] if is_right else [name]
    return wrong, seconds


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
