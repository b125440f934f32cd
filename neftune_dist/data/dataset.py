"""The tokenised documents of a run: made once, cached by content, read by memory map.

The cache (`data.cache_dir`) names an entry by a digest of all that decides its content, so an entry
is never stale; `cache` sees that it is whole and that any number of processes and jobs may start at
once. Nothing here is a collective.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig, UserError, user_path
from neftune_dist.data import cache
from neftune_dist.data.documents import Conversations, Documents, DocumentWriter, origin
from neftune_dist.data.report import MaskAudit, Report, SourceReport
from neftune_dist.data.shards import ShardMaker, ShardPool
from neftune_dist.data.sources import Source, open_source
from neftune_dist.data.split import Split, split_documents
from neftune_dist.data.tokenize import ConversationTokenizer

_VERSION = 13  # raised when the same rows and settings become other files
_PROGRESS_SECONDS = 5.0
# Settings that decide an entry's content, beside the template, and those of each source.
_DECISIVE = (
    "ignored",
    "system_prompt",
    "supervise",
    "split_conversations",
    "max_length",
    "too_long",
    "duplicates",
    "num_held_out",
    "held_out_fraction",
)
_OF_SOURCES = ("format", "columns", "weight", "max_documents")


@dataclass(frozen=True)
class Dataset:
    """The documents of a run. One that an epoch has several times is several documents.

    Attributes:
        train, held_out: the two parts.
        held_out_conversations: what the held-out documents were made from.
        report: what became of every row.
        fingerprint: the name of the cache entry.
        identity: digests of what the entry was made from, for messages that name a difference.
        chat_template: in Jinja, for users of the trained model; None where there is none.
        end_tokens: at which the trained model's generation is to stop.
    """

    train: Documents
    held_out: Documents
    held_out_conversations: Conversations
    report: Report
    fingerprint: str
    identity: dict[str, str]
    chat_template: str | None
    end_tokens: list[int]

    @property
    def content(self) -> str:
        """Digest of the training tokens and masks, which decides the order of the steps (law 4):
        the same whatever version of this project made them."""
        return self.report.content


def prepare(
    config: DataConfig, tokenizer: Any, progress: Callable[[str], None] = lambda _: None
) -> Dataset:
    """The dataset of `config`, from the cache or made now.

    Args:
        config: the section `data`.
        tokenizer: the model's, from `transformers`.
        progress: called with a line every few seconds.

    Raises:
        UserError: a source that cannot be read, too many bad rows, nothing to learn from, a cache
            that cannot be written.
    """
    template = ConversationTokenizer(tokenizer, config)
    named = config.sources  # to train on; the held-out source comes last
    if config.held_out:
        named["data.held_out_source"] = config.held_out
    sources = [open_source(given, key, config.ignored) for key, given in named.items()]
    of_template = template.identity()
    identity = [
        [s.digest, *(getattr(s.config, key) for key in _OF_SOURCES), s.key in config.sources]
        for s in sources
    ]
    fingerprint = _digest(
        {
            "version": _VERSION,
            "sources": identity,
            "settings": {key: getattr(config, key) for key in _DECISIVE},
            "tokenizer": of_template,
        }
    )
    root = user_path(config.cache_dir, "data.cache_dir") / "corpora"
    builder = _Builder(config, sources, template, root / f"{fingerprint}.shards", progress)
    try:
        folder = cache.open_or_make(root, fingerprint, builder.build, progress)
    except (OSError, NotImplementedError) as error:  # the second from a disk without file locks
        raise UserError(
            f"The tokenised data cannot be written to data.cache_dir={config.cache_dir}: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from error
    shutil.rmtree(builder.shards, ignore_errors=True)
    report = Report.of_stored(json.loads((folder / "report.json").read_text()))
    for source, counted in zip(sources, report.sources, strict=True):
        # The same content may have been read under another name when the entry was made.
        counted.name, counted.left_out = source.name, [*source.left_out]
        counted.refuse_useless(source.key, config)
    return Dataset(
        Documents(folder, "train"),
        Documents(folder, "held_out"),
        Conversations(folder),
        report,
        fingerprint,
        identity={
            "dataset": _digest(identity),
            "tokenizer": _digest(of_template),
            "template": _digest(of_template["chat_template"]),
        },
        chat_template=template.as_jinja(),
        end_tokens=template.end_of_turn[0],
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class _Builder:
    """Fills the folder of a cache entry, and counts what becomes of every row."""

    config: DataConfig
    given: Sequence[Source]
    template: ConversationTokenizer
    shards: Path
    progress: Callable[[str], None]

    @cached_property
    def report(self) -> Report:
        """The counts so far."""
        sources = [SourceReport(name=s.name, left_out=[*s.left_out]) for s in self.given]
        return Report(sources=sources)

    def build(self, folder: Path) -> None:
        """Write an entry into `folder`, which is made."""
        with closing(DocumentWriter(folder)) as writer:
            self._write_documents(writer)
        stats = writer.stats()
        split = split_documents(stats, self.config, [*self.config.sources.values()])
        writer.write_parts(split.train, split.held_out)
        self.report.content = writer.digest()
        self._count(stats, split, folder)
        (folder / "report.json").write_text(json.dumps(asdict(self.report), indent=1))

    def _write_documents(self, writer: DocumentWriter) -> None:
        """Write all documents of all sources."""
        report, config, reported = self.report, self.config, time.monotonic()
        ignored: set[str] = set()
        with closing(ShardPool(self.shards, self.template)) as pool:
            for i, (source, own) in enumerate(zip(self.given, report.sources, strict=True)):
                # Any document may be held out, unless there is a source for that.
                keep = i >= len(config.sources) if config.held_out_source else config.holds_out
                maker = ShardMaker(config, i, source.config, source.key, keep)
                missing: set[str] | None = None
                for shard in pool.shards(maker, source.rows):
                    writer.append(shard.arrays)
                    own.add(shard.report)
                    ignored.update(shard.ignored)
                    missing = {*shard.missing} & ({*shard.missing} if missing is None else missing)
                    if time.monotonic() - reported > _PROGRESS_SECONDS:
                        reported = time.monotonic()
                        num_rows = sum(counted.num_rows for counted in report.sources)
                        self.progress(f"data: {num_rows} rows tokenised")
                own.refuse_useless(source.key, config)
                if missing:
                    raise UserError(
                        f"{source.key}={source.name}: no row has {min(missing)!a}, which "
                        f"{source.key.removesuffix('source')}columns names."
                    )
        if never := sorted(set(config.ignored) - ignored):
            raise UserError(f"data.ignore_fields: no row has {never[0]!a}: leave it out.")

    def _count(self, stats: np.ndarray, split: Split, folder: Path) -> None:
        """Report what is trained on and what is left out."""
        report = self.report
        report.add_up()
        left_out = {"duplicates": split.repeated, "leaked": split.leaked}
        left_out["not_chosen"] = split.not_chosen
        for name, indices in left_out.items():
            setattr(report, f"num_{name}", len(indices))
            if len(indices):
                report.examples[f"num_{name}"] = origin(folder, int(indices[0]))
        if self.config.duplicates == "drop":
            report.num_dropped_duplicates = report.num_duplicates
        report.num_documents, report.num_held_out = len(split.train), len(split.held_out)
        stats = stats[split.train]
        report.num_tokens = int(stats["lengths"].sum())
        report.longest_tokens = int(stats["lengths"].max())
        report.num_supervised_tokens = int(stats["num_supervised"].sum())
        advice = self.template.end_of_turn[1]
        report.audit = MaskAudit.of(stats["by_speaker"], stats["end_learned"], advice)
        times = np.bincount(stats["source"], minlength=len(report.sources))
        for own, number in zip(report.sources, times, strict=True):
            own.num_occurrences = int(number)
