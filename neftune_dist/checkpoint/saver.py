"""Saving while training goes on: the loop waits for a copy in host memory, a thread does the rest.

At most one save is in flight; the next one, or the end of the run, waits for it. The thread has a
process group of its own, with its own time-out, so a slow disk trips no training collective; an
error in it is raised in the loop, on all ranks at the same step. Where host memory does not hold
the copy, or `checkpoint.mode=sync`, the loop waits for the whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from neftune_dist.checkpoint import flat, store
from neftune_dist.checkpoint.flat import WrittenFile
from neftune_dist.checkpoint.host_copy import HostCopy
from neftune_dist.config import CheckpointConfig, UserError
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import Engine, FlatShard
from neftune_dist.system import cgroups

# Of the host's available memory, what a copy of the state may take.
_SHARE_OF_MEMORY = 0.8
# How long a failing run waits for the save in flight, whose other ranks may be gone.
_LAST_SAVE_SECONDS = 60.0


class Saver:
    """Saves a run's checkpoints. Built on every rank alike; all calls are collectives."""

    def __init__(self, run_dir: Path, settings: CheckpointConfig, world: World) -> None:
        self._run_dir, self._settings = run_dir, settings
        timeout = timedelta(minutes=settings.timeout_minutes)
        self._world, self._thread_world = world, world.for_thread(timeout.total_seconds())
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._copy: HostCopy | None = None  # where saves are asynchronous
        self._asynchronous: bool | None = None  # not yet decided
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self.seconds_waited = 0.0  # that the loop stood still for the last save

    def prepare(self, engine: Engine) -> None:
        """Decide how to save, and get the memory for it: ahead of the first save, while training
        goes on."""
        if self._asynchronous is None:
            self._asynchronous = self._decide(engine.flat_state())
            if self._asynchronous:
                shards = engine.flat_state() if engine.is_saving_replica else []
                self._copy = HostCopy(shards, self._world.device)

    def save(self, step: int, engine: Engine, state: Mapping[str, Any]) -> None:
        """Save the engine's state as the checkpoint of `step`.

        Args:
            state: of the trainer; JSON-able, the same on every rank.

        Raises:
            UserError: this or the last save could not be written. What was published before is
                unharmed.
        """
        began = time.perf_counter()
        self.wait()
        shards = engine.flat_state() if engine.is_saving_replica else []
        text = json.dumps({"step": step, **state}, indent=1)
        self.prepare(engine)
        if self._copy is not None:
            work = (step, self._copy.copy(shards), text)
            self._thread = Thread(target=self._try, args=work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._try(step, shards, text)
            self.wait()
        self.seconds_waited = time.perf_counter() - began

    @property
    def failed(self) -> bool:
        """Whether the save in flight has failed on this rank: `wait` will raise."""
        return self._error is not None

    def wait(self) -> None:
        """Wait for the save in flight, and raise what went wrong in it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def abandon(self) -> None:
        """The run has failed: give the save in flight a while to be published all the same."""
        if self._thread is not None:
            self._thread.join(_LAST_SAVE_SECONDS)

    def _try(self, step: int, shards: list[FlatShard], state: str) -> None:
        try:
            self._write(step, shards, state)
        except BaseException as error:
            # The latter are gloo's words, in an error of no class of its own.
            if isinstance(error, TimeoutError) or "Timed out waiting" in str(error):
                error = UserError(
                    f"The checkpoint of step {step} was not written on all ranks within "
                    f"checkpoint.timeout_minutes={self._settings.timeout_minutes:g}."
                )
            self._error = error

    def _write(self, step: int, shards: list[FlatShard], state: str) -> None:
        world = self._thread_world
        partial = self._run_dir / "checkpoints" / f"step_{step:08d}.partial"
        with world.agree():
            if world.is_first:
                store.begin(self._run_dir, step)
        with world.agree(), store.explained(partial):
            # Also makes this node look the folder up anew, on a shared file system.
            partial.mkdir(exist_ok=True)
        with world.agree(), store.explained(partial):
            mine = flat.write(partial, shards, self._group)
        of_ranks: list[Any] = [None] * world.size
        dist.all_gather_object(of_ranks, mine, group=self._group)
        files: dict[str, WrittenFile] = {}
        for each in of_ranks:
            files |= each
        with world.agree():
            if world.is_first:
                store.publish(partial, state, files, self._settings)

    def _decide(self, shards: list[FlatShard]) -> bool:
        """Whether to copy and go on: as told, or where every machine has the memory."""
        if self._settings.mode != "auto":
            return self._settings.mode == "async"
        needed = sum(shard.tensor.nbytes for shard in shards) * self._world.local_size
        available = cgroups.memory_bytes()[0]
        room = _SHARE_OF_MEMORY * available - needed
        worst = min(self._world.gather([room, float(needed), float(available)]))
        decided = worst[0] > 0
        if not decided:
            self._world.log(
                f"checkpoint: saved synchronously: a copy takes {worst[1] / 2**30:.1f} GiB of host "
                f"memory a machine, of which {worst[2] / 2**30:.1f} GiB are free"
            )
        return decided
