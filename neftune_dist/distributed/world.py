"""The world a process lives in: rank, device, process group, agreement on errors, rank-0 output.

Long work on the host (tokenising, downloading) never happens inside a collective: ranks wait for
each other by asking the rendezvous store, which has no time limit, and hear of an error on another
rank at once.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from neftune_dist.compat.torch import default_store, process_groups, set_collective_timeout
from neftune_dist.config import UserError, check_divides
from neftune_dist.distributed import environment, outcome
from neftune_dist.distributed.device import enter_thread, set_cpu_affinity
from neftune_dist.distributed.mailbox import pauses, wait_until
from neftune_dist.distributed.process_group import (
    COLLECTIVE_TIMEOUT,
    STOP_PATIENCE_SECONDS,
    make_process_group,
)
from neftune_dist.distributed.signals import Stopped, StopSignal
from neftune_dist.system import cgroups, garbage
from neftune_dist.system.malloc import keep_freed_memory
from neftune_dist.system.text import first_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
R = TypeVar("R", bound="DataclassInstance")
# How long rank 0 waits at the end for the others, who may still be asking the store.
_LEAVE_SECONDS = 10.0
# The store's key by which ranks hear that one has stopped, or of the first failure, its text.
_STOPPED = "stopped"


def failure_of(store: dist.Store) -> str:
    """The failure of a rank that has ended alone; empty: none that is known in a world's store."""
    return store.get(_STOPPED).decode() if store.check([_STOPPED]) else ""


@dataclass(frozen=True)
class Sharing:
    """How ranks share the data: neighbours take slices of the same documents.

    Attributes:
        data_rank: index of this rank's group; groups share no document.
        data_size: number of groups.
        part: index of this rank's slice in its group, and their number.
        group: the ranks of the same documents; None where this rank has them alone.
    """

    data_rank: int
    data_size: int
    part: tuple[int, int]
    group: dist.ProcessGroup | None


class World:
    """This process among the others.

    Attributes:
        rank: index of this process.
        size: number of all processes.
        local_rank: index of this process on its machine.
        local_size: number of processes on this machine.
        device: where this rank computes.
    """

    def __init__(self, stop: StopSignal | None = None, store: dist.Store | None = None) -> None:
        """
        Args:
            stop: whose signals end a wait.
            store: by which the ranks already talk; None: they meet as torchrun's variables say.
        """
        self._stop = stop
        place = environment.find_place()
        self.rank, self.size = place.rank, place.size
        self.local_rank, self.local_size = place.local_rank, place.local_size
        self._phase = self._num_threads = 0
        self._patience_seconds = math.inf
        if torch.cuda.is_available():
            # Micro-batches differ in length: segments that grow leave no holes between them. To be
            # set before the first allocation.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(
                    f"Rank {self.rank} is number {self.local_rank} on its machine, where it sees "
                    f"{torch.cuda.device_count()} GPUs: start one process a GPU, and let each see "
                    "all of them (Slurm: --gpus-per-node, without --gpus-per-task)."
                )
            self.device = torch.device("cuda", self.local_rank)
            enter_thread(self.device)
            set_cpu_affinity(self.device)
        else:
            self.device = torch.device("cpu")
            keep_freed_memory()
        # How many of the last collectives torch remembers, for when one hangs.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        make_process_group(place, self.device, store, stop)
        self._store = dist.PrefixStore("neftune_dist", default_store())

    def share(self, count: int) -> Sharing:
        """Share documents among groups of `count` ranks: a collective.

        Raises:
            UserError: `count` does not divide the number of ranks.
        """
        check_divides("engine.sequence_parallel", count, self.size)
        group = dist.new_subgroups(count)[0] if count > 1 else None
        return Sharing(self.rank // count, self.size // count, (self.rank % count, count), group)

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for the run."""
        return self.rank == 0

    def log(self, line: str) -> None:
        """A line on rank 0's standard output; nothing on other ranks."""
        if self.is_first:
            print(line, flush=True)

    def raise_collective_timeout(self, minutes: float) -> None:
        """Let no collective of the groups made so far give up before a watchdog with this limit."""
        patience = max(COLLECTIVE_TIMEOUT, timedelta(minutes=2 * minutes))
        set_collective_timeout(process_groups(), patience)

    def own_store(self) -> dist.Store:
        """Return a connection to this world's store for one thread alone: it waits for no other
        thread's requests."""
        shared: Any = self._store
        own: dist.Store = shared.clone()
        return own

    def for_thread(self, patience_seconds: float) -> World:
        """Return this world for another thread, which agrees with the same thread of other ranks.

        A request to stop does not end its waits; ranks that do not come within
        `patience_seconds` are a `TimeoutError`. All ranks make theirs in the same order.
        """
        other = copy.copy(self)
        self._num_threads += 1
        other._store = dist.PrefixStore(f"thread {self._num_threads}", self._store)
        other._phase, other._stop, other._patience_seconds = 0, None, patience_seconds
        return other

    @contextmanager
    def agree(self) -> Iterator[None]:
        """Leave the block on all ranks together, or raise the first rank's `UserError` on all.

        Raises `Stopped` where another rank has left by that, or where this one was asked to stop
        and the others do not come; `ConnectionError` where another rank has failed.

        An error of any rank is raised on the others as soon as they reach the block's end. All
        ranks go through the same blocks in the same order.
        """
        self._phase += 1
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        failed, arrived, over = (f"{self._phase}/{key}" for key in ("failed", "arrived", "over"))
        if error:
            self._store.set(failed, str(error))
        # Of all ranks only the last one, or one that failed, has news for those that wait.
        if self._store.add(arrived, 1) == self.size or error:
            self._store.set(over, "")
        self._wait_for(over)
        if self._store.check([failed]):
            message = self._store.get(failed).decode()
            raise UserError(message, shared=True) from error

    def _wait_for(self, key: str) -> None:
        """Wait until a rank sets `key`; see `agree` for what else ends it."""
        began = time.monotonic()
        for pause in pauses(self.size):
            if self._store.check([key]):
                return
            if self._store.check([_STOPPED]):
                if failure := failure_of(self._store):
                    raise ConnectionError(failure)
                raise Stopped
            if self._stop and self._stop.has_waited(began, STOP_PATIENCE_SECONDS):
                self.tell_stopped()
                raise Stopped
            if time.monotonic() - began > self._patience_seconds:
                raise TimeoutError
            time.sleep(pause)

    def tell_stopped(self) -> None:
        """Let the other ranks, who wait for this one, stop too."""
        self._store.compare_set(_STOPPED, "", "")  # which leaves a failure as it is

    def stop_together(self) -> None:
        """Raise `Stopped` on all ranks where any was asked to stop."""
        if self.from_any("" if self._stop and self._stop() else None) is not None:
            raise Stopped

    def local_rank_zero_first(self, work: Callable[[], T]) -> T:
        """Run `work` on each machine's first rank, then on the others, who find its cache filled.

        A `UserError` of any rank is raised on all.
        """
        result: list[T] = []
        with self.agree():
            if self.local_rank == 0:
                result.append(work())
        with self.agree():
            if self.local_rank != 0:
                result.append(work())
        return result[0]

    def from_first(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        found = self.from_any(text if self.is_first else None)
        assert found is not None
        return found

    def from_any(self, text: str | None) -> str | None:
        """The text of a rank that has one, on every rank; None where none has."""
        with self.agree():
            if text is not None:
                self._store.set(f"{self._phase}/any", text)
        key = f"{self._phase}/any"
        return self._store.get(key).decode() if self._store.check([key]) else None

    def gather(self, values: list[float]) -> list[list[float]]:
        """Every rank's values, in the order of ranks: one small collective."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size == 1:
            return [mine.tolist()]
        out = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(out, mine)
        return torch.stack(out).tolist()

    def gather_fields(self, mine: R) -> list[R]:
        """Every rank's instance of a dataclass of numbers, in the order of ranks: one small
        collective."""
        fields = vars(mine)
        return [
            replace(mine, **{n: type(fields[n])(v) for n, v in zip(fields, values, strict=True)})
            for values in self.gather([float(value) for value in fields.values()])
        ]

    def device_bytes(self) -> int:
        """The memory of a rank's device, on the smallest one; on CPUs a rank's part of what its
        machine or job has."""
        if self.device.type == "cuda":
            mine = torch.cuda.get_device_properties(self.device).total_memory
        else:
            mine = cgroups.memory_bytes()[1] // self.local_size
        return int(min(value for (value,) in self.gather([float(mine)])))

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set: one small collective."""
        return any(any(row) for row in self.gather([float(flag)]))

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Every rank leaves by itself, by a mistake that all have heard of or by a request to stop;
        # by anything else alone, and perhaps because another rank is gone.
        together = error is None or isinstance(error, UserError | Stopped)
        if error and not together:
            # Those on other machines may wait for it, and hear of it in no other way.
            text = f"rank {self.rank} failed: {type(error).__name__}: {first_line(error)}"
            with suppress(RuntimeError):
                self._store.compare_set(_STOPPED, "", text)
        self.close(together=together, is_idle=error is None)

    def close(self, *, together: bool = True, is_idle: bool = True) -> None:
        """Leave the process group; rank 0, whose process may host the store, leaves last.

        Args:
            together: whether the other ranks leave, too, so that rank 0 waits for them.
            is_idle: whether no collective is under way on any rank.
        """
        with suppress(RuntimeError):  # the store may have gone with the rank that hosts it
            self._store.add("left", 1)
            if self.is_first and together:
                # No other rank waits here.
                wait_until(lambda: self._store.add("left", 0) >= self.size, 1, _LEAVE_SECONDS)
        if not is_idle and self.size > 1 and self.device.type == "cuda":
            # NCCL ends its work together: to destroy a group waits for all that it was asked to do,
            # and for all ranks of the machine. Whoever leaves alone would wait for ever, unheard.
            garbage.end_at_once()
        elif dist.is_initialized():
            dist.destroy_process_group()


def run_among_ranks(
    work: Callable[[World, StopSignal], int], stopped: str, stop: StopSignal
) -> int:
    """Run `work`, which every rank calls, and return its exit code.

    Args:
        work: takes the world and the requests to stop.
        stopped: what rank 0 says where a request ended `work` with nothing to save.
        stop: the requests.
    """
    stop.hear_ctrl_c()
    try:
        with World(stop) as world:
            try:
                return work(world, stop)
            except Stopped:
                world.tell_stopped()
                raise
    except Stopped:
        if environment.number("RANK", 0) == 0:
            print(stopped, flush=True)
        return outcome.EXIT_STOPPED
    finally:
        stop.ignore()
