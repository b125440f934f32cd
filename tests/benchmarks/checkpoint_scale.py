"""Planning a checkpoint of a 7B model on 512 ranks, without its tensors: time and memory.

What every rank plans, what rank 0 makes of all plans, the description that is written, and what a
rank of another world size plans to read from it. Tensors are on the meta device; nothing is sent.

usage: python tests/benchmarks/checkpoint_scale.py [ranks]
"""

from __future__ import annotations

import pickle
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.filesystem import _StorageInfo

from neftune_dist.checkpoint import flat
from neftune_dist.checkpoint.flat import _LoadPlanner, _SavePlanner
from neftune_dist.engine.base import MASTER, FlatShard
from neftune_dist.optim.param_slice import STATE_NAMES
from neftune_dist.system import garbage


def shapes() -> dict[str, tuple[int, ...]]:
    """Of Llama-2-7B."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def shards(of: dict[str, tuple[int, ...]], rank: int, world_size: int) -> list[FlatShard]:
    """What a rank holds under FSDP2."""
    found = []
    for name, shape in of.items():
        numel = torch.Size(shape).numel()
        rows, row = -(-shape[0] // world_size), numel // shape[0]
        start, stop = (min(i * rows, shape[0]) * row for i in (rank, rank + 1))
        if start < stop:
            tensor = torch.empty(stop - start, device="meta")
            found += [
                FlatShard(kind, name, start, tensor, numel) for kind in (MASTER, *STATE_NAMES)
            ]
    return found


def main() -> None:
    world_size = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    of = shapes()
    parameters = sum(torch.Size(shape).numel() for shape in of.values())
    print(f"{parameters / 1e9:.2f} B parameters, {len(of)} tensors, {world_size} ranks")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def told(what: str, began: float) -> None:
        mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        seconds = time.perf_counter() - began
        print(f"{what:44} {seconds:7.2f} s, host memory so far {mib:6.0f} MiB", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        writer = dcp.FileSystemWriter(folder)
        plans, began = [], time.perf_counter()
        for rank in range(world_size):
            writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
            local = _SavePlanner(shards(of, rank, world_size)).create_local_plan()
            plans.append(writer.prepare_local_plan(local))
            if rank == 0:
                told("one rank's plan", began)
                print(f"{'':44} {len(pickle.dumps(plans[0])) / 2**20:7.2f} MiB sent to rank 0")
        began = time.perf_counter()
        received = [pickle.loads(pickle.dumps(plan)) for plan in plans]
        told("rank 0 packs and unpacks all plans", began)
        began = time.perf_counter()
        final, metadata = _SavePlanner([]).create_global_plan(received)
        final = writer.prepare_global_plan(final)
        told("rank 0 makes the whole plan", began)
        metadata.storage_data = {
            item.index: _StorageInfo(f"__{rank}_0.distcp", 0, 1)
            for rank, plan in enumerate(final)
            for item in plan.items
        }
        began = time.perf_counter()
        file = Path(folder) / ".metadata"
        file.write_bytes(pickle.dumps(metadata))
        told(f"the description, {file.stat().st_size / 2**20:.0f} MiB, is written", began)
        began = time.perf_counter()
        described = flat.Reader(Path(folder), alone=True).metadata
        told("a rank reads it", began)
        for other in (8, 384):
            began = time.perf_counter()
            with garbage.without_collecting():  # as Reader.read has it
                planner = _LoadPlanner(shards(of, 1, other))
                planner.set_up_planner({}, described)
                items = len(planner.create_local_plan().items)
            told(f"rank 1 of {other} plans to read {items} pieces", began)


if __name__ == "__main__":
    main()
