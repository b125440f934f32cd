"""Functions called on several processes that gloo joins."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from tests.support import tiny_model

DEADLINE_SECONDS = 100


def on_ranks(function: Callable[..., Any], number: int, folder: Path) -> list[Any]:
    """What `function(folder)` returns on each of so many processes that gloo joins."""
    tiny_model.forkserver()
    context = torch.multiprocessing.start_processes(
        _on_rank, (number, function, folder), number, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + DEADLINE_SECONDS
    try:
        while not context.join(max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(number)]


def _on_rank(rank: int, number: int, function: Callable[..., Any], folder: Path) -> None:
    # What torchrun sets, for transformers.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number))
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=number)
    torch.save(function(folder), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
