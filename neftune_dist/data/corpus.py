"""The tokenised documents of a run: made once, cached by content, read by memory map.

Owns the cache (`data.cache_dir`) and the report on what became of every row. A cache entry is named
by a digest of all that decides its content, so it is never stale; it is written aside and renamed,
so a half-written one is never read; a file lock lets any number of processes and jobs start at
once. Nothing here is a collective.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data.formats import (
    BadRow,
    Conversation,
    Source,
    Turn,
    detect_format,
    open_source,
    to_conversation,
)
from neftune_dist.data.rendered import Rendered
from neftune_dist.data.template import Document, Template

_VERSION = 3  # of what this module and the template make of the same input
_BATCH_ROWS = 1000
_PROGRESS_SECONDS = 5.0
_NAMED_ROWS = 20  # bad rows that the report names one by one
# Settings that decide what a cache entry holds.
_DECISIVE = (
    "format",
    "template",
    "system_prompt",
    "supervise",
    "max_length",
    "too_long",
    "num_held_out",
)

Example = tuple[Conversation, Document]


@dataclass
class Report:
    """What became of the rows of a source: num_rows is the sum of num_documents, num_held_out and
    the three kinds that were left out. Tokens and lengths are of the documents to train on."""

    source: str
    num_rows: int = 0
    num_documents: int = 0
    num_held_out: int = 0
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_truncated: int = 0
    num_dropped_too_long: int = 0
    num_nothing_to_learn: int = 0
    num_bad_rows: int = 0
    end_of_turn_learned: float = 0.0  # share of documents whose last token is learned
    longest_tokens: int = 0
    bad_rows: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        supervised = self.num_supervised_tokens / max(1, self.num_tokens)
        lines = [
            f"data: {self.source}: {self.num_rows} rows, {self.num_documents} documents to train "
            f"on, {self.num_held_out} held out",
            f"data: {self.num_tokens} tokens, {supervised:.1%} of them supervised; longest "
            f"document {self.longest_tokens} tokens; end of turn learned in "
            f"{self.end_of_turn_learned:.1%} of documents",
        ]
        if self.num_truncated:
            lines.append(f"data: {self.num_truncated} documents truncated to data.max_length")
        if self.num_dropped_too_long:
            lines.append(
                f"data: {self.num_dropped_too_long} documents over data.max_length dropped"
            )
        if self.num_nothing_to_learn:
            lines.append(
                f"data: {self.num_nothing_to_learn} documents skipped: no supervised token within "
                "data.max_length"
            )
        if self.num_bad_rows:
            lines.append(f"data: {self.num_bad_rows} rows skipped:")
            lines += [f"data:   {self.source}, {each}" for each in self.bad_rows]
            if self.num_bad_rows > len(self.bad_rows):
                lines.append(f"data:   and {self.num_bad_rows - len(self.bad_rows)} more")
        return lines


class Documents:
    """Tokenised documents in memory maps. Indexable; cheap to open, whatever their number."""

    def __init__(self, folder: Path) -> None:
        self._ids = np.load(folder / "input_ids.npy", mmap_mode="r")
        self._supervised = np.load(folder / "supervised.npy", mmap_mode="r")
        self._offsets = np.load(folder / "offsets.npy")
        self.lengths = np.diff(self._offsets)  # int64 (num_documents,): tokens
        self.num_supervised = np.load(folder / "num_supervised.npy")  # int64 (num_documents,)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids int32 and supervised uint8, each (length,)."""
        piece = slice(self._offsets[index], self._offsets[index + 1])
        return self._ids[piece], self._supervised[piece]

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents int64 (num_chosen,) one behind the other: input_ids int32 and supervised
        uint8, each (num_tokens,)."""
        lengths = self.lengths[indices]
        begins = self._offsets[indices] - (np.cumsum(lengths) - lengths)
        tokens = np.arange(lengths.sum()) + np.repeat(begins, lengths)
        return self._ids[tokens], self._supervised[tokens]


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, what was reported of them, and their fingerprint."""

    train: Documents
    held_out: Documents
    held_out_conversations: list[Conversation]
    report: Report
    fingerprint: str
    # Digests of what made it, for a message that says which of them is another.
    identity: dict[str, str] = field(default_factory=dict)


def prepare(
    config: DataConfig, tokenizer: Any, progress: Callable[[str], None] = lambda _: None
) -> Corpus:
    """The corpus of `config.source`, from the cache or made now.

    Args:
        progress: told a line every few seconds.

    Raises:
        UserError: a source that cannot be read, too many bad rows, nothing to learn from, a cache
            that cannot be written or is damaged.
    """
    template = Template(tokenizer, config)
    source = open_source(config)
    fingerprint = _fingerprint(config, source, template)
    try:
        root = Path(config.cache_dir).expanduser() / "corpora"
    except RuntimeError as error:
        raise UserError(f"data.cache_dir={config.cache_dir} names no known user.") from error
    entry = root / fingerprint
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not entry.exists():
            with FileLock(root / f"{fingerprint}.lock"):
                if not entry.exists():
                    _make(entry, config, source, template, progress)
    except (OSError, NotImplementedError) as error:  # the second from a disk without file locks
        raise UserError(
            f"The tokenised data cannot be written to data.cache_dir={config.cache_dir}: "
            f"{getattr(error, 'strerror', None) or error}."
        ) from error
    tokenizer_digest = hashlib.sha256(json.dumps(template.identity(), sort_keys=True).encode())
    identity = {"dataset": source.digest, "tokenizer": tokenizer_digest.hexdigest()[:24]}
    corpus = replace(load(entry, source.name), identity=identity)
    _refuse_bad_share(corpus.report, config)
    return corpus


def load(entry: Path, source_name: str) -> Corpus:
    """Open a finished cache entry. Raises `UserError` where it has been damaged since."""
    try:
        report = Report(**json.loads((entry / "report.json").read_text()))
        with (entry / "held_out.jsonl").open(encoding="utf-8") as file:
            conversations = [_conversation(json.loads(line)) for line in file]
        train, held_out = Documents(entry / "train"), Documents(entry / "held_out")
    except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
        raise UserError(
            f"The tokenised data in {entry} is damaged ({error}): remove that directory, and it "
            "is made again."
        ) from error
    report.source = source_name  # the same content may have been read under another name
    return Corpus(train, held_out, conversations, report, entry.name)


def _fingerprint(config: DataConfig, source: Source, template: Template) -> str:
    decisive = {
        "version": _VERSION,
        "source": source.digest,
        "settings": {key: getattr(config, key) for key in _DECISIVE},
        "tokenizer": template.identity(),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:24]


def _make(
    entry: Path,
    config: DataConfig,
    source: Source,
    template: Template,
    progress: Callable[[str], None],
) -> None:
    report = Report(source.name)
    examples = list(_examples(config, source, report, template, progress))
    if report.num_rows == 0:
        raise UserError(f"data.source={source.name} is empty.")
    _refuse_bad_share(report, config)
    if not examples:
        raise UserError(
            f"data.source={source.name} holds no document to learn from: of {report.num_rows} "
            f"rows, {report.num_bad_rows} cannot be used"
            + (f" (the first: {report.bad_rows[0]})" if report.bad_rows else "")
            + f", {report.num_dropped_too_long} are over data.max_length={config.max_length}, "
            f"{report.num_nothing_to_learn} have no supervised token within it."
        )
    held_out, train = _split(examples, config.num_held_out)
    # Only the holder of the entry's lock is here: what others have left was left by the dead.
    for left in entry.parent.glob(f"{entry.name}.*.part"):
        shutil.rmtree(left, ignore_errors=True)
    aside = entry.with_name(f"{entry.name}.{os.getpid()}.part")
    try:
        for name, part in (("train", train), ("held_out", held_out)):
            _write_documents(aside / name, [document for _, document in part])
        (aside / "held_out.jsonl").write_text(
            "".join(json.dumps(asdict(conversation)) + "\n" for conversation, _ in held_out),
            encoding="utf-8",
        )
        documents = [document for _, document in train]
        report.num_documents, report.num_held_out = len(train), len(held_out)
        report.num_tokens = sum(len(d.input_ids) for d in documents)
        report.num_supervised_tokens = sum(int(d.supervised.sum()) for d in documents)
        report.longest_tokens = max(len(d.input_ids) for d in documents)
        report.end_of_turn_learned = sum(d.end_learned for d in documents) / len(documents)
        (aside / "report.json").write_text(json.dumps(asdict(report), indent=1))
        for file in aside.rglob("*.*"):
            _sync(file)
        aside.rename(entry)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refuse_bad_share(report: Report, config: DataConfig) -> None:
    if report.num_bad_rows > config.max_bad_fraction * report.num_rows:
        raise UserError(
            f"data.source={report.source}: {report.num_bad_rows} of {report.num_rows} rows cannot "
            f"be used, more than data.max_bad_fraction={config.max_bad_fraction}; the first: "
            f"{report.bad_rows[0]}."
        )


def _examples(
    config: DataConfig,
    source: Source,
    report: Report,
    template: Template,
    progress: Callable[[str], None],
) -> Iterator[Example]:
    rendered = _rendered(config, source, report, template)
    told = time.monotonic()
    while batch := list(islice(rendered, _BATCH_ROWS)):
        documents = template.encode([r for _, r in batch])
        for (conversation, _), document in zip(batch, documents, strict=True):
            kept = _fit(document, config, report)
            if kept is not None:
                yield conversation, kept
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            progress(f"data: {report.num_rows} rows tokenised")


def _rendered(
    config: DataConfig, source: Source, report: Report, template: Template
) -> Iterator[tuple[Conversation, Rendered]]:
    format_name = None if config.format == "auto" else config.format
    for number, row in source.rows:
        report.num_rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            format_name = format_name or detect_format(row)
            conversation = to_conversation(row, format_name)
            yield conversation, template.render(conversation)
        except BadRow as error:
            report.num_bad_rows += 1
            if len(report.bad_rows) < _NAMED_ROWS:
                report.bad_rows.append(f"row {number}: {error}")


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


def _split(examples: list[Example], num_held_out: int) -> tuple[list[Example], list[Example]]:
    """(held out, to train on): whole prompts are held out, chosen by a hash of the prompt, so no
    prompt is on both sides and the choice does not depend on the order of the rows. A prompt is all
    that stands in front of the first answer."""
    by_prompt: dict[str, list[int]] = {}
    for i, (conversation, _) in enumerate(examples):
        prompt = json.dumps(conversation.opening())
        by_prompt.setdefault(hashlib.sha256(prompt.encode()).hexdigest(), []).append(i)
    chosen: set[int] = set()
    for key in sorted(by_prompt):
        if len(chosen) >= num_held_out:
            break
        chosen.update(by_prompt[key])
    if len(chosen) == len(examples):
        raise UserError(
            f"data.num_held_out={num_held_out} leaves none of the {len(examples)} documents to "
            "train on."
        )
    held_out = [example for i, example in enumerate(examples) if i in chosen]
    return held_out, [example for i, example in enumerate(examples) if i not in chosen]


def _write_documents(folder: Path, documents: list[Document]) -> None:
    folder.mkdir(parents=True)
    lengths = np.array([len(d.input_ids) for d in documents], dtype=np.int64)
    np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "num_supervised.npy", np.array([d.supervised.sum() for d in documents], "i8"))
    for name, dtype in (("input_ids", np.int32), ("supervised", np.uint8)):
        flat = [getattr(document, name) for document in documents]
        np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, dtype), *flat]))


def _sync(file: Path) -> None:
    """Put a file on the disk, so that a machine that dies leaves no entry with a name and no
    content."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _conversation(stored: dict[str, Any]) -> Conversation:
    return Conversation(
        tuple(Turn(*turn) for turn in stored["turns"]),
        stored["context"],
        tuple((key, value) for key, value in stored["extra"]),
        stored["tools"],
        stored["text"],
    )
