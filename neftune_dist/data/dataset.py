"""The tokenised documents of a run: made once, cached by content, read by memory map.

Owns the cache (`data.cache_dir`) and the way of every row into it. A cache entry is named by a
digest of all that decides its content, so it is never stale; `entry` sees that it is whole and that
any number of processes and jobs may start at once. Nothing here is a collective.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig, SourceConfig, UserError, user_path
from neftune_dist.data import cache
from neftune_dist.data.documents import Conversations, Documents, DocumentStats, DocumentWriter
from neftune_dist.data.formats import Conversation, detect_format, to_conversation
from neftune_dist.data.mask_preview import MaskAudit
from neftune_dist.data.report import NAMED_ROWS, Report, SourceReport
from neftune_dist.data.sources import BadRow, Source, open_source
from neftune_dist.data.spans import Rendered
from neftune_dist.data.split import Split, select
from neftune_dist.data.tokenize import ConversationTokenizer, Document

_VERSION = 6  # of what this module and the template make of the same input
# Tokenised together: many, unless they are long.
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 2**22
_PROGRESS_SECONDS = 5.0
# Settings that decide what a cache entry holds, beside those of the sources and the template.
_DECISIVE = (
    "format",
    "system_prompt",
    "supervise",
    "max_length",
    "too_long",
    "duplicates",
    "num_held_out",
    "held_out_fraction",
)

_Row = tuple[str, Conversation, Rendered]  # its place in the source first


@dataclass(frozen=True)
class Dataset:
    """Training and held-out documents, what was reported of them, the name of their cache entry,
    and a digest of their content, which decides the order of the steps (law 4). A document
    that an epoch has several times is several documents, each with an index of its own."""

    train: Documents
    held_out: Documents
    held_out_conversations: Conversations
    report: Report
    fingerprint: str
    # Digests of what made it, for a message that says which of them is another.
    identity: dict[str, str] = field(default_factory=dict)
    chat_template: str | None = None  # in Jinja, for users of the trained model; None: it has none

    @property
    def content(self) -> str:
        """The same for the same tokens and masks, by whatever version they were made."""
        return self.report.content


@dataclass(frozen=True)
class _Input:
    """What is read: sources to train on with their settings, then the held-out source if any."""

    sources: tuple[Source, ...]
    settings: tuple[SourceConfig, ...]

    @staticmethod
    def open(config: DataConfig) -> _Input:
        sources = [open_source(each, key) for key, each in config.sources.items()]
        if config.held_out:
            sources.append(open_source(config.held_out, "data.held_out_source"))
        return _Input(tuple(sources), tuple(config.sources.values()))

    def identity(self) -> list[list[Any]]:
        """Plain values: digests, and how often what they stand for is trained on."""
        own = [[each.digest] for each in self.sources[len(self.settings) :]]
        return [
            [source.digest, each.format, each.weight, each.max_documents]
            for source, each in zip(self.sources, self.settings, strict=False)
        ] + own

    def formats(self, config: DataConfig) -> list[str]:
        """Of each source; that of the held-out one is the training data's where that is said."""
        return [*(each.format for each in self.settings), config.format][: len(self.sources)]


def prepare(
    config: DataConfig, tokenizer: Any, progress: Callable[[str], None] = lambda _: None
) -> Dataset:
    """The dataset of the sources in `config`, from the cache or made now.

    Args:
        progress: told a line every few seconds.

    Raises:
        UserError: a source that cannot be read, too many bad rows, nothing to learn from, a cache
            that cannot be written or is damaged.
    """
    template = ConversationTokenizer(tokenizer, config)
    given = _Input.open(config)
    fingerprint = _fingerprint(config, given, template)
    root = user_path(config.cache_dir, "data.cache_dir") / "corpora"
    try:
        folder = cache.obtain(
            root,
            fingerprint,
            lambda folder: _make(folder, config, given, template, progress),
            progress,
        )
    except (OSError, NotImplementedError) as error:  # the second from a disk without file locks
        raise UserError(
            f"The tokenised data cannot be written to data.cache_dir={config.cache_dir}: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from error
    identity = {
        "dataset": _short_digest(given.identity()),
        "tokenizer": _short_digest(template.identity()),
        "template": _short_digest(template.identity()["chat_template"]),
    }
    dataset = replace(
        load(folder, [source.name for source in given.sources]),
        identity=identity,
        chat_template=template.as_jinja(),
    )
    for source, told in zip(given.sources, dataset.report.sources, strict=True):
        _refuse_bad_share(source, told, config)
    return dataset


def load(folder: Path, names: list[str]) -> Dataset:
    """Open a finished cache entry. Raises `UserError` where it cannot be read.

    Args:
        names: of the sources; the same content may have been read under others.
    """
    try:
        stored = json.loads((folder / "report.json").read_text())
        told = [SourceReport(**each) for each in stored.pop("sources")]
        for each, name in zip(told, names, strict=True):
            each.name = name
        report = Report(told, audit=MaskAudit(**stored.pop("audit")), **stored)
        train, held_out = (Documents(folder, part) for part in ("train", "held_out"))
        conversations = Conversations(folder)
        if len(conversations) != len(held_out):
            raise ValueError(f"{len(held_out)} conversations are wanted, of {len(conversations)}")
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise UserError(
            f"The tokenised data in {folder} is damaged ({error}): remove that directory, and it "
            "is made again."
        ) from error
    return Dataset(train, held_out, conversations, report, folder.name)


def _fingerprint(config: DataConfig, given: _Input, template: ConversationTokenizer) -> str:
    return _short_digest(
        {
            "version": _VERSION,
            "sources": given.identity(),
            "settings": {key: getattr(config, key) for key in _DECISIVE},
            "tokenizer": template.identity(),
        }
    )


def _short_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _make(
    folder: Path,
    config: DataConfig,
    given: _Input,
    template: ConversationTokenizer,
    progress: Callable[[str], None],
) -> None:
    report = Report([SourceReport(each.name, left_out=[*each.left_out]) for each in given.sources])
    writer = DocumentWriter(folder)
    try:
        _fill(writer, config, given, report, template, progress)
    finally:
        writer.close()
    stats = writer.stats()
    _finish(folder, writer, stats, select(stats, config, given.settings), report)


def _fill(
    writer: DocumentWriter,
    config: DataConfig,
    given: _Input,
    report: Report,
    template: ConversationTokenizer,
    progress: Callable[[str], None],
) -> None:
    """Put all documents of all sources into the writer."""
    told = time.monotonic()
    formats = given.formats(config)
    for i, (source, own) in enumerate(zip(given.sources, report.sources, strict=True)):
        # Any document may be held out, unless there is a source for that.
        is_kept = i >= len(given.settings) if config.held_out_source else config.holds_out
        rendered = _rendered(source, formats[i], own, report, template)
        for batch in _batches(rendered):
            documents = template.encode([r for _, _, r in batch])
            for (place, conversation, _), document in zip(batch, documents, strict=True):
                fitted = _fit(document, config, report)
                if fitted is None:
                    continue
                own.num_documents += 1
                report.num_plain_texts += bool(conversation.text)
                report.num_turns_left_out += conversation.num_left_out
                writer.add(fitted, conversation, i, place, is_kept)
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                progress(f"data: {report.num_rows} rows tokenised")
        _refuse_useless(source, own, report, config)


def _finish(
    folder: Path, writer: DocumentWriter, stats: DocumentStats, chosen: Split, report: Report
) -> None:
    """Make a writer an entry: its parts, and the report."""
    writer.choose(stats, chosen.train, chosen.held_out)
    report.content = writer.digest()
    for name in ("num_duplicates", "num_dropped_duplicates", "num_leaked", "num_not_chosen"):
        setattr(report, name, getattr(chosen, name))
    report.num_documents, report.num_held_out = len(chosen.train), len(chosen.held_out)
    lengths = stats.lengths[chosen.train]
    report.num_tokens, report.longest_tokens = int(lengths.sum()), int(lengths.max())
    report.num_supervised_tokens = int(stats.num_supervised[chosen.train].sum())
    report.audit = MaskAudit.of(stats.spoken[chosen.train], stats.end_learned[chosen.train])
    times = np.bincount(stats.source[chosen.train], minlength=len(report.sources))
    for own, number in zip(report.sources, times, strict=True):
        own.num_occurrences = int(number)
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1))


def _refuse_useless(source: Source, own: SourceReport, report: Report, config: DataConfig) -> None:
    what = f"{source.key}={source.name}"
    if own.num_rows == 0:
        raise UserError(f"{what} is empty.")
    _refuse_bad_share(source, own, config)
    if own.num_documents == 0:
        raise UserError(
            f"{what} holds no document to learn from: of {own.num_rows} rows, {own.num_bad_rows} "
            "cannot be used"
            + (f" (the first: {own.bad_rows[0]})" if own.bad_rows else "")
            + f", {report.num_dropped_too_long} are over data.max_length={config.max_length}, "
            f"{report.num_nothing_to_learn} have no supervised token within it."
        )


def _refuse_bad_share(source: Source, own: SourceReport, config: DataConfig) -> None:
    if own.num_bad_rows > config.max_bad_fraction * own.num_rows:
        raise UserError(
            f"{source.key}={source.name}: {own.num_bad_rows} of {own.num_rows} rows cannot "
            f"be used, more than data.max_bad_fraction={config.max_bad_fraction}; the first: "
            f"{own.bad_rows[0]}."
        )


def _rendered(
    source: Source,
    format_name: str,
    own: SourceReport,
    report: Report,
    template: ConversationTokenizer,
) -> Iterator[_Row]:
    """The good rows. All rows of a source have the format of the first good one."""
    for place, row in source.rows:
        report.num_rows += 1
        own.num_rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            found = detect_format(row) if format_name == "auto" else format_name
            conversation = to_conversation(row, found)
            rendered = template.render(conversation)
        except BadRow as error:
            report.num_bad_rows += 1
            own.num_bad_rows += 1
            if len(own.bad_rows) < NAMED_ROWS:
                own.bad_rows.append(f"{place}: {error}")
            continue
        format_name = found
        yield str(place), conversation, rendered


def _batches(
    rendered: Iterator[_Row],
) -> Iterator[list[_Row]]:
    batch, characters = [], 0
    for each in rendered:
        batch.append(each)
        characters += len(each[2].text)
        if len(batch) == _BATCH_ROWS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _fit(document: Document, config: DataConfig, report: Report) -> Document | None:
    kept = slice(config.max_length)
    too_long = len(document.input_ids) > config.max_length
    if too_long and config.too_long == "drop":
        report.num_dropped_too_long += 1
        return None
    if not document.supervised[kept].any():
        report.num_nothing_to_learn += 1
        return None
    if not too_long:
        return document
    report.num_truncated += 1
    return document.cut(config.max_length)
