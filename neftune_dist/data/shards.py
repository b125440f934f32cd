"""Shards: the documents of consecutive rows of a source, with what became of those rows.

A shard is a pure function of its rows, the settings and the format of the source's first good row,
so that any process may make it, and one that was kept on disk is as good as one made now.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig, SourceConfig
from neftune_dist.data.columns import Columns
from neftune_dist.data.conversation import Conversation
from neftune_dist.data.documents import STATS
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import detect_format, to_conversation
from neftune_dist.data.report import NAMED_ROWS, Report, SourceReport
from neftune_dist.data.spans import SPEAKERS, Rendered
from neftune_dist.data.tokenize import ConversationTokenizer, Document

_BATCH_CHARACTERS = 2**22  # of rendered text that is tokenised together
Row = tuple[str, Mapping[str, Any] | BadRow]  # its place in the source first
_Rendered = tuple[str, Conversation, Rendered]


@dataclass(frozen=True)
class Shard:
    """Documents and counts of some rows.

    Attributes:
        arrays: stats, `documents.STATS` of every document; input_ids and supervised of all of them;
            conversations and origins, uint8, lines of JSON.
        report: counts of the rows, with one source.
        ignored, missing: as in `Columns`, in order.
        usual: the format of the source's first good row; "" before it.
    """

    arrays: dict[str, np.ndarray]
    report: Report
    ignored: list[str]
    missing: list[str]
    usual: str

    def save(self, path: Path) -> None:
        """Write the shard; its name appears with its content."""
        counts = {**vars(self), "report": asdict(self.report)}
        arrays = counts.pop("arrays")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.part")
        with partial.open("wb") as file:
            np.savez(file, counts=_bytes(json.dumps(counts).encode()), **arrays)
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Shard | None:
        """Read a shard; None where there is none, or one that is not what was written."""
        try:
            with np.load(path) as stored:  # compares the checksums of a zip file
                arrays = {name: stored[name] for name in stored.files}
            counts = json.loads(arrays.pop("counts").tobytes())
            if arrays["stats"].dtype != STATS:  # of another version
                return None
            return Shard(arrays, Report.of_stored(counts.pop("report")), **counts)
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
            return None


@dataclass(frozen=True)
class ShardMaker:
    """Makes shards of one source's rows.

    Attributes:
        config: the section `data`.
        source, setting: the source's index, and its settings.
        keep: store the conversations too, because they may be held out.
        usual: the format of the source's first good row; "" before it.
    """

    config: DataConfig
    source: int
    setting: SourceConfig
    keep: bool
    usual: str = ""

    def make(self, template: ConversationTokenizer, rows: Sequence[Row]) -> Shard:
        """The documents of some rows."""
        making = _Making(self, template)
        for batch in _batches(making.rendered(rows)):
            documents = template.encode([rendered for _, _, rendered in batch])
            for (place, conversation, _), document in zip(batch, documents, strict=True):
                making.add(place, conversation, document)
        return making.shard()


class _Making:
    """A shard that is being made."""

    def __init__(self, maker: ShardMaker, template: ConversationTokenizer) -> None:
        self.maker, self.template, self.usual = maker, template, maker.usual
        self.columns = Columns(maker.setting.columns, maker.config.ignored)
        self.own = SourceReport("")
        self.report = Report([self.own])
        self.documents: list[Document] = []
        self.stats: list[tuple[Any, ...]] = []
        self.conversations, self.origins = bytearray(), bytearray()

    def rendered(self, rows: Sequence[Row]) -> Iterator[_Rendered]:
        """The good rows. Plain texts and conversations do not mix in a source."""
        report, own, format_name = self.report, self.own, self.maker.setting.format
        for place, row in rows:
            report.num_rows += 1
            own.num_rows += 1
            try:
                if isinstance(row, BadRow):
                    raise row
                row = self.columns.apply(row)
                found = detect_format(row, self.usual) if format_name == "auto" else format_name
                conversation = to_conversation(row, found)
                documents = self.template.documents(conversation)
            except BadRow as error:
                report.num_bad_rows += 1
                own.num_bad_rows += 1
                if len(own.bad_rows) < NAMED_ROWS:
                    own.bad_rows.append(f"{place}: {error}")
                continue
            self.usual = self.usual or found
            own.formats[found] = own.formats.get(found, 0) + 1
            report.num_split += len(documents) > 1
            report.num_added_by_split += len(documents) - 1
            for part, rendered in documents:
                yield str(place), part, rendered

    def add(self, place: str, conversation: Conversation, document: Document) -> None:
        """Add a document, where `data.max_length` leaves something to learn."""
        origin = (self.maker.source, place)
        fitted = self._fit(document, origin)
        if fitted is None:
            return
        report = self.report
        self.own.num_documents += 1
        report.num_plain_texts += bool(conversation.text)
        report.num_turns_left_out += conversation.num_left_out
        if conversation.num_left_out:
            report.examples.setdefault("num_turns_left_out", origin)
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
        self.origins += json.dumps(origin).encode() + b"\n"

    def _fit(self, document: Document, origin: tuple[int, str]) -> Document | None:
        """The document within `data.max_length`; None where it is dropped."""
        config, own, report = self.maker.config, self.own, self.report
        max_length, length = config.max_length, len(document.input_ids)
        own.num_too_long += length > max_length
        own.longest_tokens = max(own.longest_tokens, length)
        if length > max_length and config.too_long == "drop":
            outcome = "num_dropped_too_long"
        elif not document.supervised[:max_length].any():
            outcome = "num_nothing_to_learn"
        elif length > max_length:
            outcome = "num_truncated"
        else:
            return document
        setattr(report, outcome, getattr(report, outcome) + 1)
        report.examples.setdefault(outcome, origin)
        return document.cut(max_length) if outcome == "num_truncated" else None

    def shard(self) -> Shard:
        """The shard of all documents that were added."""
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


def _batches(rendered: Iterator[_Rendered]) -> Iterator[list[_Rendered]]:
    batch, characters = [], 0
    for row in rendered:
        batch.append(row)
        characters += len(row[2].text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
