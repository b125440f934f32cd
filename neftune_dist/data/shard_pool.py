"""The shards of a source in their order, made by several processes where there are many rows.

The rows are read here and sent to processes that write their shards to a folder, from which they
are read back in order: the result is that of one process, byte for byte. Shards stay there until
the cache entry is whole, so that an interrupted preparation takes them up again.
"""

from __future__ import annotations

import os
import pickle
import signal
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data.shards import Row, Shard, ShardMaker
from neftune_dist.data.tokenize import ConversationTokenizer
from neftune_dist.system.cgroups import num_cores
from neftune_dist.system.children import end_with_parent

# Of a shard: many rows, unless they are large.
_SHARD_ROWS, _SHARD_BYTES = 1000, 2**22
# Rows that are tokenised without other processes: these take seconds to start.
_ALONE_ROWS = 20_000
_MOST_WORKERS = 16  # chosen for data.num_workers=0; each holds some 0.5 GiB


class ShardPool:
    """Makes the shards of all sources of a cache entry.

    Args:
        folder: for shards; made where it is needed.
        template: of this process; others make their own from its tokenizer and settings.
    """

    def __init__(self, folder: Path, template: ConversationTokenizer) -> None:
        self.folder, self.template = folder, template
        self.num_workers = template.config.num_workers or min(_MOST_WORKERS, int(num_cores()) or 1)
        self._num_rows = 0
        self._executor: ProcessPoolExecutor | None = None

    def close(self) -> None:
        """End the other processes."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def shards(self, maker: ShardMaker, rows: Iterator[Row]) -> Iterator[Shard]:
        """The shards of one source, in the order of its rows. Raises `UserError` for the first
        mistake in that order, as one process would."""
        chunks, first = _chunks(rows), 0
        pending: deque[Callable[[], Shard]] = deque()
        while True:
            try:
                chunk = next(chunks, None)
            except UserError:
                for wait in pending:
                    wait()  # a mistake in an earlier row comes first
                raise
            if chunk is None:
                break
            self._num_rows += len(chunk)
            if self._num_rows <= _ALONE_ROWS or not maker.usual:
                shard = maker.make(self.template, chunk)
                maker = replace(maker, usual=shard.usual)
                yield shard
            else:
                pending.append(self._start(maker, first, chunk))
                if len(pending) > 2 * self.num_workers:
                    yield pending.popleft()()
            first += len(chunk)
        while pending:
            yield pending.popleft()()

    def _start(self, maker: ShardMaker, first: int, rows: list[Row]) -> Callable[[], Shard]:
        """Begin a shard, unless an interrupted preparation has left it; return what waits for
        it."""
        path = self.folder / f"{maker.source}_{first:012d}.npz"
        kept = Shard.load(path)
        if kept is not None and kept.report.num_rows == len(rows):
            return lambda: kept
        if self.num_workers == 1:
            made = maker.make(self.template, rows)
            made.save(path)
            return lambda: made
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                self.num_workers,
                get_context("spawn"),
                _enter_worker,
                (os.getpid(), self.template.tokenizer, self.template.config),
            )
        future = self._executor.submit(_make, maker, rows, path)

        def wait() -> Shard:
            try:
                future.result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"One of the {self.num_workers} processes that tokenise the data has ended, "
                    "perhaps for lack of memory: lower data.num_workers; the same command "
                    "continues."
                ) from error
            shard = Shard.load(path)
            if shard is None:
                raise OSError(f"{path} is not what was written")
            return shard

        return wait


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """The rows by shards. A mistake that ends the reading is raised after the rows before it."""
    chunk: list[Row] = []
    size, mistake = 0, None
    try:
        for row in rows:
            chunk.append(row)
            size += len(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
            if len(chunk) == _SHARD_ROWS or size >= _SHARD_BYTES:
                yield chunk
                chunk, size = [], 0
    except UserError as error:
        mistake = error
    if chunk:
        yield chunk
    if mistake is not None:
        raise mistake


_worker: ConversationTokenizer  # of a process of the pool


def _enter_worker(parent: int, tokenizer: Any, config: DataConfig) -> None:
    global _worker
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, too
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has its process
    _worker = ConversationTokenizer(tokenizer, config)


def _make(maker: ShardMaker, rows: list[Row], path: Path) -> None:
    maker.make(_worker, rows).save(path)
