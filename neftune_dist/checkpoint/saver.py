"""Saving while training continues: the loop waits for a copy in host memory, a thread writes it.

At most one save is in flight; the next save, or the end of the run, waits for it. The thread has a
separate process group with a separate time-out, so a slow disk ends no training collective; its
error is raised in the loop, on all ranks at the same step. Where host memory does not hold the
copy, or `checkpoint.mode=sync`, the loop waits for the whole save.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from neftune_dist.checkpoint import flat, store
from neftune_dist.checkpoint.host_copy import HostCopy
from neftune_dist.config import CheckpointConfig, UserError
from neftune_dist.distributed.device import enter_thread
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import Engine, FlatShard
from neftune_dist.system import cgroups
from neftune_dist.system.text import size_text

# The part of the host's available memory that a copy of the state may take.
_SHARE_OF_MEMORY = 0.8
# How long a failing run waits for the save in flight, whose other ranks may be gone.
_LAST_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class _HostMemory:
    """What a rank needs and sees of its machine's memory.

    Attributes:
        machine: the first rank on the rank's machine, which identifies it.
        needed: bytes of the rank's copy.
        available: bytes available on the machine.
    """

    machine: int
    needed: int
    available: int


class Saver:
    """Saves a run's checkpoints. Every rank builds one; all calls are collectives."""

    def __init__(self, run_dir: Path, settings: CheckpointConfig, world: World) -> None:
        self._run_dir, self._settings = run_dir, settings
        timeout = timedelta(minutes=settings.timeout_minutes)
        self._world, self._thread_world = world, world.for_thread(timeout.total_seconds())
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._copy: HostCopy | None = None  # None: saves are synchronous
        self._asynchronous: bool | None = None  # not yet decided
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self.seconds_waited = 0.0  # by the loop, for the last save

    def prepare(self, engine: Engine) -> None:
        """Decide how to save, and allocate the memory for it before the first save."""
        if self._asynchronous is None:
            shards = engine.flat_state() if engine.is_saving_replica else []
            self._asynchronous = self._decide(shards)
            if self._asynchronous:
                self._copy = HostCopy(shards, self._world.device)

    def save(
        self, step: int, engine: Engine, state: Mapping[str, Any], best_step: int | None = None
    ) -> None:
        """Save the engine's state as the checkpoint of `step`.

        Args:
            state: of the trainer; JSON-able, the same on every rank.
            best_step: of the checkpoint that is kept as the best.

        Raises:
            UserError: this or the last save could not be written. Published checkpoints are
                unharmed.
        """
        began = time.perf_counter()
        self.wait()
        shards = engine.flat_state() if engine.is_saving_replica else []
        text = json.dumps({"step": step, **state}, indent=1)
        self.prepare(engine)
        if self._copy is not None:
            work = (step, self._copy.copy(shards), text, best_step)
            self._thread = Thread(
                target=self._save_in_thread, args=work, name="checkpoint", daemon=True
            )
            self._thread.start()
        else:
            self._try(step, shards, text, best_step)
            self.wait()
        self.seconds_waited = time.perf_counter() - began

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed on this rank, so that `wait` will raise."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save in flight, and raise its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abandon(self) -> None:
        """Give the save in flight of a failed run a limited time to be published."""
        if self._thread is not None:
            self._thread.join(_LAST_SAVE_SECONDS)

    def _save_in_thread(self, *work: Any) -> None:
        enter_thread(self._world.device)  # DCP waits for its current stream
        self._try(*work)

    def _try(self, step: int, shards: list[FlatShard], state: str, best_step: int | None) -> None:
        try:
            self._write(step, shards, state, best_step)
        except BaseException as error:
            # gloo raises a RuntimeError for a time-out; only its text tells.
            if isinstance(error, TimeoutError) or "Timed out waiting" in str(error):
                error = UserError(
                    f"The checkpoint of step {step} was not written on all ranks within "
                    f"checkpoint.timeout_minutes={self._settings.timeout_minutes:g}."
                )
            self._error = error

    def _write(self, step: int, shards: list[FlatShard], state: str, best_step: int | None) -> None:
        world = self._thread_world
        partial = self._run_dir / "checkpoints" / f"step_{step:08d}.partial"
        with world.agree():
            if world.is_first:
                store.begin(self._run_dir, step)
        with world.agree(), store.explained(partial):
            # On a shared file system this also makes the node look the folder up again.
            partial.mkdir(exist_ok=True)
        with world.agree(), store.explained(partial):
            mine = flat.write(partial, shards, self._group)
        of_ranks: list[Any] = [None] * world.size
        dist.all_gather_object(of_ranks, mine, group=self._group)
        files = {name: file for of_rank in of_ranks for name, file in of_rank.items()}
        with world.agree():
            if world.is_first:
                store.publish(partial, state, files, self._settings, best_step)

    def _decide(self, shards: list[FlatShard]) -> bool:
        """Whether to copy and continue: as configured, or where every machine has the memory."""
        if self._settings.mode != "auto":
            return self._settings.mode == "async"
        world, needed = self._world, sum(shard.tensor.nbytes for shard in shards)
        machine, available = world.rank - world.local_rank, cgroups.memory_bytes()[0]
        ranks = world.gather_fields(_HostMemory(machine, needed, available))
        for machine in {rank.machine for rank in ranks}:
            there = [rank for rank in ranks if rank.machine == machine]
            needed = sum(rank.needed for rank in there)
            available = min(rank.available for rank in there)
            if needed >= _SHARE_OF_MEMORY * available:
                world.log(
                    f"checkpoint: saved synchronously: a copy takes {size_text(needed)} of host "
                    f"memory on a machine, of which {size_text(available)} are free"
                )
                return False
        return True
