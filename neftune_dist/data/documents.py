"""Tokenised documents on disk: written one by one, split, read by memory map.

The files of a cache entry. The tokens of all documents lie in two flat files. An index for either
part (train, held out) names the ranges that are its documents, in order and with repetitions, so
that a split copies no token. Memory holds some 50 bytes for a document, not the document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.spans import SPEAKERS
from neftune_dist.data.tokenize import Document

_FILES = {"input_ids.bin": np.int32, "supervised.bin": np.uint8}
_CONVERSATIONS = "conversations.jsonl"  # those that may be held out, removed after the split
_HELD_OUT = "held_out.jsonl"
_ORIGINS = "origins.jsonl"


class Documents:
    """A part of the documents, in memory maps; cheap to open, whatever their number.

    Attributes:
        lengths, num_supervised: int64 (num_documents,), tokens.
        starts: int64 (num_documents,), where each document begins in the flat files.
        content: uint64 (num_documents,), digests of the conversations, see `DocumentStats`.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self._ids, self._supervised = (
            np.memmap(folder / name, dtype, mode="r") for name, dtype in _FILES.items()
        )
        index = np.load(folder / f"{part}.npy")
        self.starts, self.lengths, self.num_supervised, self._numbers, content = index
        self.content = content.view(np.uint64)
        self._folder = folder
        end = int((self.starts + self.lengths).max(initial=0))
        if not end <= len(self._ids) == len(self._supervised):
            raise ValueError(f"{end} tokens are needed, of {len(self._ids)}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids int32 and supervised uint8, (length,) each."""
        piece = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self._ids[piece], self._supervised[piece]

    def origin(self, index: int) -> tuple[int, str]:
        """The index of a document's source, and the document's place in it."""
        return _origin(self._folder, int(self._numbers[index]))

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents int64 (num_chosen,) concatenated: input_ids int32 and supervised uint8,
        (num_tokens,) each."""
        lengths = self.lengths[indices]
        begins = self.starts[indices] - (np.cumsum(lengths) - lengths)
        tokens = np.arange(lengths.sum()) + np.repeat(begins, lengths)
        return self._ids[tokens], self._supervised[tokens]


class Conversations:
    """The held-out conversations, in the order of their documents, read from disk on access."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _HELD_OUT
        with self._path.open("rb") as file:
            lengths = np.array([len(line) for line in file], np.int64)
        self._starts = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Conversation:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            stored = json.loads(file.readline())
        stored["turns"] = tuple(Turn(*turn) for turn in stored["turns"])
        stored["extra"] = tuple((key, value) for key, value in stored["extra"])
        return Conversation(**stored)


@dataclass(frozen=True)
class DocumentStats:
    """Columns over all documents of all sources, arrays of shape (num_documents,).

    Attributes:
        lengths, num_supervised: int64, tokens.
        end_learned: bool, whether the end of the last supervised answer is supervised.
        source: int64, index of the document's source.
        content: uint64 digest of the conversation. Two of 10 million different conversations share
            one with a probability of 3e-6.
        prompt: uint64 digest of the text before the first answer without the system prompt, in
            lower case and with single spaces.
        by_speaker: int32 (num_documents, len(SPEAKERS), 2), all and supervised tokens by speaker.
    """

    lengths: np.ndarray
    num_supervised: np.ndarray
    end_learned: np.ndarray
    source: np.ndarray
    content: np.ndarray
    prompt: np.ndarray
    by_speaker: np.ndarray


class DocumentWriter:
    """Writes documents one by one into a new folder, then the index of either part."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        names = (*_FILES, _CONVERSATIONS, _ORIGINS)
        self._files: dict[str, IO[bytes]] = {name: (folder / name).open("wb") for name in names}
        self._columns = {name: array("q") for name in ("lengths", "num_supervised", "source")}
        self._columns |= {name: array("Q") for name in ("content", "prompt")}
        self._end_learned = bytearray()
        self._by_speaker = array("i")
        self._lines = array("q")  # where a conversation begins; -1: not kept

    def add(
        self, document: Document, conversation: Conversation, source: int, place: str, keep: bool
    ) -> None:
        """Write a document.

        Args:
            document, conversation: the tokens, and what they were made from.
            source, place: the index of the source, and the place of the row in it.
            keep: store the conversation too, because it may be held out.
        """
        for name, values in zip(_FILES, (document.input_ids, document.supervised), strict=True):
            self._files[name].write(values.tobytes())
        row = {
            "lengths": len(document.input_ids),
            "num_supervised": int(document.supervised.sum()),
            "source": source,
            "content": _digest(
                [conversation.turns, conversation.context, conversation.tools, conversation.text]
            ),
            "prompt": _digest(_normalised_prompt(conversation)),
        }
        for name, value in row.items():
            self._columns[name].append(value)
        self._end_learned.append(document.end_learned)
        self._by_speaker.extend(_tokens_by_speaker(document))
        self._files[_ORIGINS].write(json.dumps([source, place]).encode() + b"\n")
        self._lines.append(self._files[_CONVERSATIONS].tell() if keep else -1)
        if keep:
            line = json.dumps(asdict(conversation)).encode() + b"\n"
            self._files[_CONVERSATIONS].write(line)

    def stats(self) -> DocumentStats:
        """The columns of all documents; no more can be added."""
        self.close()
        columns = {
            name: np.frombuffer(column, np.uint64 if column.typecode == "Q" else np.int64)
            for name, column in self._columns.items()
        }
        by_speaker = np.frombuffer(self._by_speaker, np.int32).reshape(-1, len(SPEAKERS), 2)
        end_learned = np.frombuffer(self._end_learned, np.bool_)
        return DocumentStats(**columns, end_learned=end_learned, by_speaker=by_speaker)

    def write_parts(self, stats: DocumentStats, train: np.ndarray, held_out: np.ndarray) -> None:
        """Write the index of either part: int64 indices of documents, with repetitions."""
        starts = np.cumsum(stats.lengths) - stats.lengths
        numbers, content = np.arange(len(starts)), stats.content.view(np.int64)
        columns = (starts, stats.lengths, stats.num_supervised, numbers, content)
        for part, chosen in (("train", train), ("held_out", held_out)):
            np.save(self._folder / f"{part}.npy", np.stack([column[chosen] for column in columns]))
        stored = self._folder / _CONVERSATIONS
        with stored.open("rb") as every, (self._folder / _HELD_OUT).open("wb") as kept:
            for i in held_out:
                every.seek(self._lines[i])
                kept.write(every.readline())
        stored.unlink()

    def origin(self, index: int) -> tuple[int, str]:
        """The index of a document's source, and its place there; no more can be added."""
        return _origin(self._folder, index)

    def digest(self) -> str:
        """A digest of the training part alone: tokens and masks in order, and how often an epoch
        has each document, however they were made."""
        train = Documents(self._folder, "train")
        # Occurrences of a document follow each other; its tokens count once.
        is_first = np.diff(train.starts, prepend=-1) != 0
        total = hashlib.sha256(train.lengths.data)
        total.update(is_first.data)
        for i in itertools.compress(itertools.count(), is_first):
            for values in train[i]:
                total.update(values.data)
        return total.hexdigest()[:24]

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self._files.values():
            file.close()


def _origin(folder: Path, number: int) -> tuple[int, str]:
    with (folder / _ORIGINS).open(encoding="utf-8") as file:
        source, place = json.loads(next(islice(file, number, None)))
    return source, place


def _tokens_by_speaker(document: Document) -> list[int]:
    """Tokens and supervised tokens of every speaker, alternating."""
    pairs = document.speakers * 2 + document.supervised
    kinds = np.bincount(pairs, minlength=2 * len(SPEAKERS)).reshape(-1, 2)
    counts: list[int] = np.stack([kinds.sum(axis=1), kinds[:, 1]], axis=1).ravel().tolist()
    return counts


def _normalised_prompt(conversation: Conversation) -> list[str]:
    """What is asked; not the system prompt, under which the same question is the same."""
    said = [m for m in conversation.opening() if m["role"] != "system"]
    opening = [str(message["content"]) for message in said]
    return [" ".join(text.split()).casefold() for text in opening or [conversation.text]]


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8], "big")
