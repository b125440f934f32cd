"""The watchdog: a run that stands still ends by itself, and says which rank holds it up and where.

The main thread reports each phase that it begins; one that exceeds the limit has hung. Three clocks
watch, each in case the one before is stopped:

- the listener, a thread that talks to the other ranks over the rendezvous store. When one rank
  exceeds its limit, all report their phase, one prints who holds up whom, all write their stacks
  and collectives into the run's folder, and all end. It also ends a rank that waits for one that
  has failed, or whose store has gone with its host;
- the guard, a thread that ends this process alone where the store or the disk does not answer;
- faulthandler's timer, outside Python, where native code keeps every Python thread from running.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from neftune_dist.distributed import outcome
from neftune_dist.distributed.hang_report import Report, explain, flight_record, observe
from neftune_dist.distributed.mailbox import Mailbox, wait_until
from neftune_dist.distributed.world import World, failure_of
from neftune_dist.system import storage

# How often a rank looks at its clock and asks the store; a tenth of the limit where that is less.
_POLL_SECONDS = 2.0
# How long the others have to report their phase, before they count as frozen.
_ANSWER_SECONDS = 10.0
# How long after its limit a rank that still lives ends alone.
_PATIENCE_SECONDS = 4 * _ANSWER_SECONDS
# How long after the failure of another rank, or the loss of the store, the main thread may go on:
# it may have heard of it, too.
_OUTLIVE_SECONDS = 30.0
_NO_STORE = (
    "the rendezvous store does not answer: what holds it, rank 0 or its launcher, is frozen or gone"
)


class Watchdog:
    """Watches this rank until `close`; nothing is limited before the first `at`."""

    def __init__(self, world: World, folder: Path, limit_minutes: float) -> None:
        """
        Args:
            world: this rank among the others.
            folder: for the report of a hang; made if missing.
            limit_minutes: of each phase of the main thread, which calls this.

        Raises:
            UserError: the folder cannot be written.
        """
        self._rank, self._size = world.rank, world.size
        self._folder, self._limit = folder, 60 * limit_minutes
        self._poll = min(_POLL_SECONDS, self._limit / 10)
        self._mark = (0, "before the first step", time.monotonic(), False)
        self._main = threading.get_ident()
        self._closed, self._ending = threading.Event(), threading.Lock()
        with storage.writing(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
            # Open from the start: faulthandler's timer cannot open it.
            self._stacks = self._path("stacks.txt").open("a")
        self._world_store = world.own_store()
        self._store = dist.PrefixStore("watchdog", self._world_store)
        works = [self._guard, self._listen] if self._size > 1 else [self._guard]
        self._threads = [threading.Thread(target=work, daemon=True) for work in works]
        self._wind_timer()
        for thread in self._threads:
            thread.start()

    def at(self, step: int, what: str, *, limited: bool = True) -> None:
        """Begin the phase `what` of `step` of the main thread.

        Args:
            step: of the run.
            what: the phase, for the report.
            limited: False where something else ends a hang of this phase.
        """
        self._mark = (step, f"step {step}: {what}", time.monotonic(), limited)

    def close(self) -> None:
        """Watch no more. Does not return where a hang is ending the process."""
        self._closed.set()
        with self._ending:
            pass
        for thread in self._threads:
            thread.join(_ANSWER_SECONDS)  # no longer: the store may not answer
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        with suppress(OSError):
            if self._path("stacks.txt").stat().st_size == 0:
                self._path("stacks.txt").unlink()

    def _path(self, what: str) -> Path:
        return self._folder / f"hang_rank_{self._rank}_{what}"

    def _seconds_late(self) -> float:
        _, _, since, limited = self._mark
        return time.monotonic() - since - self._limit if limited else -1.0

    def _wind_timer(self) -> None:
        """Postpone the end of this process by faulthandler, which comes where Python stands still.

        It comes later than the others find that this rank does not answer, since it makes the
        launcher end them; and before the launcher, which sees the others end, kills this rank.
        """
        seconds = self._limit + 2 * _ANSWER_SECONDS
        faulthandler.dump_traceback_later(seconds, file=self._stacks, exit=True)

    def _guard(self) -> None:
        patience = _PATIENCE_SECONDS if self._size > 1 else 0.0
        while not self._closed.wait(self._poll):
            self._wind_timer()
            if self._seconds_late() > patience:
                self._ending.acquire(blocking=False)  # or a listener holds it that is stuck
                mine = {self._rank: self._report()}
                cause = _NO_STORE if self._size > 1 else explain(mine, 1)
                # In a thread, as the disk may be what hangs.
                last = threading.Thread(target=self._report_alone, args=(cause, mine), daemon=True)
                last.start()
                last.join(_ANSWER_SECONDS)
                os._exit(outcome.EXIT_FAILED)

    def _listen(self) -> None:
        store, cause = self._store, ""
        try:
            while not self._closed.wait(self._poll) and not cause:
                if self._seconds_late() > 0:
                    store.set("asked", "")
                if store.check(["asked"]):
                    with self._ending:
                        self._confer()
                cause = failure_of(self._world_store)
        except dist.DistNetworkError:
            cause = "the rendezvous store has gone, with rank 0 or its launcher"
        except RuntimeError:  # it does not answer; the guard is still there
            return
        if cause and not self._closed.wait(_OUTLIVE_SECONDS):
            line = f"neftune-dist: rank {self._rank} lost another: {cause}\n"
            with suppress(OSError):
                os.write(2, line.encode())
                outcome.tell(self._rank, outcome.ORPHANED, self._mark[0], cause)
            os._exit(outcome.EXIT_FAILED)

    def _confer(self) -> None:
        """Report a hang that all ranks know of, dump the stacks, and end."""
        store = self._store
        mailbox = Mailbox(store, self._rank, self._size)
        mailbox.post("report", asdict(self._report()))
        if store.add("speakers", 1) == 1:
            posted = mailbox.collect("report", range(self._size), _ANSWER_SECONDS)
            reports = {rank: Report.from_dict(fields) for rank, fields in posted.items()}
            self._tell(explain(reports, self._size), reports)
            store.set("said", str(len(reports)))
        self._wait_for("said", 2 * _ANSWER_SECONDS)
        self._dump()
        # The launcher ends all when one has ended, so all dump first.
        with suppress(RuntimeError):  # the store has gone with its host, who had seen all of them
            dumped = store.add("dumps", 1)
            if not store.check(["said"]) or dumped >= int(store.get("said")):
                store.set("dumped", "")
            self._wait_for("dumped", _ANSWER_SECONDS)
        os._exit(outcome.EXIT_FAILED)

    def _wait_for(self, key: str, seconds: float) -> None:
        wait_until(lambda: self._store.check([key]), self._size, seconds)

    def _report(self) -> Report:
        _, phase, since, _ = self._mark
        return observe(phase, time.monotonic() - since, self._main)

    def _report_alone(self, cause: str, reports: Mapping[int, Report]) -> None:
        self._tell(cause, reports)
        self._dump()

    def _tell(self, cause: str, reports: Mapping[int, Report]) -> None:
        lines = [f"neftune-dist: hang: {cause}"]
        lines += [f"  rank {rank}: {report}" for rank, report in reports.items()]
        lines += [f"  stacks and collectives of all ranks: {self._folder}/hang_rank_*", ""]
        text = "\n".join(lines)
        # Past Python's streams, whose locks the main thread may hold.
        with suppress(OSError):
            os.write(2, text.encode())
        with suppress(OSError):
            outcome.tell(self._rank, outcome.FAILED, self._mark[0], f"hang: {cause}")
            with (self._folder / "hang.txt").open("a") as file:
                file.write(text)

    def _dump(self) -> None:
        faulthandler.dump_traceback(self._stacks)
        with suppress(OSError):
            self._path("collectives.json").write_text(json.dumps(flight_record()))
