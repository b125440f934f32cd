"""Shards: the documents of consecutive rows of a source, with what became of those rows.

A shard is a pure function of its rows, the settings and the format of the source's first good row,
so that any process may make it, and one that was kept on disk is as good as one made now. Many rows
are sent to other processes, whose shards come back in order: the result is that of one process,
byte for byte. They are also written to a folder, where they stay until the cache entry is whole, so
that an interrupted preparation takes them up again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import signal
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from neftune_dist.config import DataConfig, SourceConfig, UserError
from neftune_dist.data.columns import Columns
from neftune_dist.data.conversation import Conversation
from neftune_dist.data.documents import STATS
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import detect_format, to_conversation
from neftune_dist.data.report import NAMED_ROWS, SourceReport
from neftune_dist.data.spans import SPEAKERS, Rendered
from neftune_dist.data.tokenize import ConversationTokenizer, Document
from neftune_dist.system import storage
from neftune_dist.system.cgroups import num_cores
from neftune_dist.system.children import end_with_parent

_SHARD_ROWS, _SHARD_BYTES = 1000, 2**22  # the most of a shard
_ALONE_ROWS = 20_000  # tokenised without other processes, which take seconds to start
_MOST_WORKERS = 16  # chosen for data.num_workers=0; each holds some 0.5 GiB
_BATCH_CHARACTERS = 2**22  # of rendered text that is tokenised together
Row = tuple[str, Mapping[str, Any] | BadRow]  # its place in the source first
_Rendered = tuple[str, Conversation, Rendered]
T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Documents and counts of some rows.

    Attributes:
        arrays: stats, `documents.STATS` of every document; input_ids and supervised of all of them;
            conversations and origins, uint8, lines of JSON.
        report: counts of the rows.
        ignored, missing: as in `Columns`, in order.
        usual: the format of the source's first good row; "" before it.
    """

    arrays: dict[str, np.ndarray]
    report: SourceReport
    ignored: list[str]
    missing: list[str]
    usual: str

    def save(self, path: Path) -> None:
        """Write the shard; its name appears with its content."""
        counts = {**vars(self), "report": vars(self.report)}
        arrays = counts.pop("arrays")
        content = io.BytesIO()
        np.savez(content, counts=_bytes(json.dumps(counts).encode()), **arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, content.getvalue())

    @staticmethod
    def load(path: Path) -> Shard | None:
        """Read a shard; None where there is none, or one that is not what was written."""
        try:
            with np.load(path) as stored:  # compares the checksums of a zip file
                arrays = {name: stored[name] for name in stored.files}
            counts = json.loads(arrays.pop("counts").tobytes())
            return Shard(arrays, SourceReport(**counts.pop("report")), **counts)
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            return None


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of one source's rows.

    Attributes:
        config: the section `data`.
        source, setting, key: the source's index, its settings, and the key of that which names it.
        keep: store the conversations too, because they may be held out.
        usual: the format of the source's first good row; "" before it.
    """

    config: DataConfig
    source: int
    setting: SourceConfig
    key: str
    keep: bool
    usual: str = ""

    def make(self, template: ConversationTokenizer, rows: Sequence[Row]) -> Shard:
        """The documents of some rows."""
        making = _Making(self, template)
        rendered = making.rendered(rows)
        for batch in _groups(rendered, lambda item: len(item[2].text), _BATCH_CHARACTERS):
            documents = template.encode([item for _, _, item in batch])
            for (place, conversation, _), document in zip(batch, documents, strict=True):
                making.add(place, conversation, document)
        return making.shard()


class _Making:
    """A shard that is being made."""

    def __init__(self, maker: ShardMaker, template: ConversationTokenizer) -> None:
        self.maker, self.template, self.usual = maker, template, maker.usual
        key = maker.key.removesuffix("source") + "columns"
        self.columns = Columns(maker.setting.columns, maker.config.ignored, key)
        self.report = SourceReport()
        self.documents: list[Document] = []
        self.stats: list[tuple[Any, ...]] = []
        self.conversations, self.origins = bytearray(), bytearray()

    def rendered(self, rows: Sequence[Row]) -> Iterator[_Rendered]:
        """The good rows. Plain texts and conversations do not mix in a source."""
        report, format_name = self.report, self.maker.setting.format
        for place, given in rows:
            report.num_rows += 1
            try:
                if isinstance(given, BadRow):
                    raise given
                row = self.columns.apply(given)
                found = detect_format(row, self.usual) if format_name == "auto" else format_name
                conversation = to_conversation(row, found)
                documents = self.template.documents(conversation)
            except BadRow as error:
                report.num_bad_rows += 1
                if len(report.bad_rows) < NAMED_ROWS:
                    known = {} if isinstance(given, BadRow) else given
                    report.bad_rows.append(f"{place}: {self.columns.reason(error, known)}")
                continue
            self.usual = self.usual or found
            report.formats[found] = report.formats.get(found, 0) + 1
            report.num_split += len(documents) > 1
            report.num_added_by_split += len(documents) - 1
            for part, rendered in documents:
                yield place, part, rendered

    def add(self, place: str, conversation: Conversation, document: Document) -> None:
        """Add a document, where `data.max_length` leaves something to learn."""
        fitted = self._fit(document, place)
        if fitted is None:
            return
        self.report.num_documents += 1
        self.report.num_plain_texts += bool(conversation.text)
        if conversation.num_left_out:
            self.report.count("num_turns_left_out", place, conversation.num_left_out)
        said = [conversation.turns, conversation.context, conversation.tools, conversation.text]
        kept = json.dumps(vars(conversation)).encode() + b"\n" if self.maker.keep else b""
        self.documents.append(fitted)
        self.stats.append(
            (
                len(fitted.input_ids),
                fitted.supervised.sum(),
                _digest(said),
                _digest(_normalised_prompt(conversation)),
                fitted.end_learned,
                _tokens_by_speaker(fitted),
                len(kept),
                self.maker.source,
            )
        )
        self.conversations += kept
        self.origins += json.dumps((self.maker.source, place)).encode() + b"\n"

    def _fit(self, document: Document, place: str) -> Document | None:
        """The document within `data.max_length`; None where it is dropped."""
        config, report, length = self.maker.config, self.report, len(document.input_ids)
        is_too_long = length > config.max_length
        report.num_too_long += is_too_long
        report.longest_tokens = max(report.longest_tokens, length)
        if is_too_long and config.too_long == "drop":
            report.count("num_dropped_too_long", place)
            return None
        if not document.supervised[: config.max_length].any():
            report.count("num_nothing_to_learn", place)
            return None
        if is_too_long:
            report.count("num_truncated", place)
            return document.cut(config.max_length)
        return document

    def shard(self) -> Shard:
        documents, no_tokens = self.documents, np.zeros(0, np.int32)
        arrays = {
            "stats": np.array(self.stats, STATS),
            "input_ids": np.concatenate([no_tokens, *(d.input_ids for d in documents)]),
            "supervised": np.concatenate([_bytes(b""), *(d.supervised for d in documents)]),
            "conversations": _bytes(self.conversations),
            "origins": _bytes(self.origins),
        }
        ignored, missing = sorted(self.columns.ignored), sorted(self.columns.missing)
        return Shard(arrays, self.report, ignored, missing, self.usual)


def _groups(
    items: Iterable[T], size_of: Callable[[T], int], most: int, most_items: int | None = None
) -> Iterator[list[T]]:
    """Consecutive items, a group ended by its size or by its number of items."""
    group, size = list[T](), 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= most or len(group) == most_items:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bytes(data: bytes | bytearray) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _tokens_by_speaker(document: Document) -> np.ndarray:
    """All and supervised tokens of every speaker, (len(SPEAKERS), 2)."""
    pairs = document.speakers * 2 + document.supervised
    kinds = np.bincount(pairs, minlength=2 * len(SPEAKERS)).reshape(-1, 2)
    return np.stack([kinds.sum(axis=1), kinds[:, 1]], axis=1)


def _normalised_prompt(conversation: Conversation) -> list[str]:
    """What is asked; not the system prompt, under which the same question is the same."""
    said = [m for m in conversation.opening() if m["role"] != "system"]
    opening = [str(message["content"]) for message in said]
    return [" ".join(text.split()).casefold() for text in opening or [conversation.text]]


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8], "big")


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
        """The shards of one source, in the order of its rows. Raises `UserError`."""
        try:
            yield from self._shards(maker, rows)
        except BrokenProcessPool as error:
            raise UserError(
                f"One of the {self.num_workers} processes that tokenise the data has ended, "
                "perhaps for lack of memory: lower data.num_workers; the same command continues."
            ) from error

    def _shards(self, maker: ShardMaker, rows: Iterator[Row]) -> Iterator[Shard]:
        first = 0
        pending: deque[Callable[[], Shard]] = deque()
        for chunk in _chunks(rows):
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
        return self._executor.submit(_make, maker, rows, path).result


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """The rows by shards. A mistake that ends the reading is raised after the rows before it."""
    mistakes = []

    def good() -> Iterator[Row]:
        try:
            yield from rows
        except UserError as error:
            mistakes.append(error)

    def num_bytes(row: Row) -> int:
        return len(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))

    yield from _groups(good(), num_bytes, _SHARD_BYTES, _SHARD_ROWS)
    for mistake in mistakes:
        raise mistake


_worker: ConversationTokenizer  # of a process of the pool


def _enter_worker(parent: int, tokenizer: Any, config: DataConfig) -> None:
    global _worker
    end_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C, too
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has its process
    _worker = ConversationTokenizer(tokenizer, config)


def _make(maker: ShardMaker, rows: list[Row], path: Path) -> Shard:
    made = maker.make(_worker, rows)
    made.save(path)
    return made
