"""Tokenised documents on the disk: written as they come, chosen from, read by memory map.

Owns the files of a cache entry. All tokens lie one behind the other in two flat files; an index for
each part (train, held out) says which stretches of them are its documents, in which order and how
often, so that choosing copies no token. Memory holds some 50 bytes of a document, not the document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from neftune_dist.data.formats import Conversation, Turn
from neftune_dist.data.spans import SPEAKERS
from neftune_dist.data.tokenize import Document

_FILES = {"input_ids.bin": np.int32, "supervised.bin": np.uint8}
_SPOKEN = "conversations.jsonl"
_HELD_OUT = "held_out.jsonl"
_ORIGINS = "origins.jsonl"


class Documents:
    """A part of the documents, in memory maps. Indexable; cheap to open, whatever their number."""

    def __init__(self, folder: Path, part: str) -> None:
        self._ids, self._supervised = (
            np.memmap(folder / name, dtype, mode="r") for name, dtype in _FILES.items()
        )
        index = np.load(folder / f"{part}.npy")
        # int64 (num_documents,) each: the first three in tokens.
        self.starts, self.lengths, self.num_supervised, self._numbers, content = index
        self.content = content.view(np.uint64)  # digests of the conversations, see `DocumentStats`
        self._origins = folder / _ORIGINS
        ends = int((self.starts + self.lengths).max(initial=0))
        if not ends <= len(self._ids) == len(self._supervised):
            raise ValueError(f"{ends} tokens are wanted, of {len(self._ids)}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids int32 and supervised uint8, each (length,)."""
        piece = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self._ids[piece], self._supervised[piece]

    def origin(self, index: int) -> tuple[int, str]:
        """Which source a document is from, by its index, and where it stands in that."""
        with self._origins.open(encoding="utf-8") as file:
            source, place = json.loads(next(islice(file, int(self._numbers[index]), None)))
        return source, place

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The documents int64 (num_chosen,) one behind the other: input_ids int32 and supervised
        uint8, each (num_tokens,)."""
        lengths = self.lengths[indices]
        begins = self.starts[indices] - (np.cumsum(lengths) - lengths)
        tokens = np.arange(lengths.sum()) + np.repeat(begins, lengths)
        return self._ids[tokens], self._supervised[tokens]


class Conversations(Sequence[Conversation]):
    """The held-out conversations, in the order of their documents, read where they are asked
    for."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _HELD_OUT
        with self._path.open("rb") as file:
            lengths = np.array([len(line) for line in file], np.int64)
        self._starts = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        with self._path.open("rb") as file:
            if isinstance(index, slice):
                return [_read(file, start) for start in self._starts[index]]
            return _read(file, self._starts[index])

    def __iter__(self) -> Iterator[Conversation]:
        with self._path.open("rb") as file:
            for line in file:
                yield _conversation(line)


@dataclass(frozen=True)
class DocumentStats:
    """What is known of all documents, chosen or not; arrays of shape (num_documents,).

    lengths, num_supervised: int64, tokens. end_learned: bool. source: int64, index of its source.
    content, prompt: uint64 digests of the conversation, and of what precedes the first answer with
        case and white space made alike. (Of 10 million documents two differ and have the same one
        with a probability of 3e-6.)
    spoken: int32 (num_documents, len(SPEAKERS), 2), tokens and learned ones of each speaker.
    """

    lengths: np.ndarray
    num_supervised: np.ndarray
    end_learned: np.ndarray
    source: np.ndarray
    content: np.ndarray
    prompt: np.ndarray
    spoken: np.ndarray


class DocumentWriter:
    """Takes documents one by one and writes them into a folder, which it makes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: list[IO[bytes]] = [(folder / name).open("wb") for name in _FILES]
        self._conversations = (folder / _SPOKEN).open("wb")
        self._origins = (folder / _ORIGINS).open("wb")
        self._columns = {name: array("q") for name in ("lengths", "num_supervised", "source")}
        self._columns |= {name: array("Q") for name in ("content", "prompt")}
        self._end_learned = bytearray()
        self._spoken = array("i")
        self._lines = array("q")  # where a conversation begins; -1: not kept

    def add(
        self, document: Document, conversation: Conversation, source: int, place: str, keep: bool
    ) -> None:
        """Write a document, which stands at a place in a source; `keep`: its conversation too, as
        it may be held out."""
        for file, values in zip(
            self._files, (document.input_ids, document.supervised), strict=True
        ):
            file.write(values.tobytes())
        row = {
            "lengths": len(document.input_ids),
            "num_supervised": int(document.supervised.sum()),
            "source": source,
            "content": _digest([conversation.turns, *_beside(conversation)]),
            "prompt": _digest(_prompt(conversation)),
        }
        for name, value in row.items():
            self._columns[name].append(value)
        self._end_learned.append(document.end_learned)
        self._spoken.extend(_spoken_by(document))
        self._origins.write(json.dumps([source, place]).encode() + b"\n")
        self._lines.append(self._conversations.tell() if keep else -1)
        if keep:
            self._conversations.write(json.dumps(asdict(conversation)).encode() + b"\n")

    def stats(self) -> DocumentStats:
        """Of all that was added; nothing can be added after."""
        self.close()
        columns = {
            name: np.frombuffer(column, np.uint64 if column.typecode == "Q" else np.int64)
            for name, column in self._columns.items()
        }
        spoken = np.frombuffer(self._spoken, np.int32).reshape(-1, len(SPEAKERS), 2)
        return DocumentStats(
            **columns, end_learned=np.frombuffer(self._end_learned, np.bool_), spoken=spoken
        )

    def choose(self, stats: DocumentStats, train: np.ndarray, held_out: np.ndarray) -> None:
        """Make the parts: int64 indices of documents, with repetitions."""
        starts = np.cumsum(stats.lengths) - stats.lengths
        for part, chosen in (("train", train), ("held_out", held_out)):
            numbers, content = np.arange(len(starts)), stats.content.view(np.int64)
            columns = (starts, stats.lengths, stats.num_supervised, numbers, content)
            index = [column[chosen] for column in columns]
            np.save(self._folder / f"{part}.npy", np.stack(index))
        spoken = self._folder / _SPOKEN
        with spoken.open("rb") as every, (self._folder / _HELD_OUT).open("wb") as kept:
            for i in held_out:
                every.seek(self._lines[i])
                kept.write(every.readline())
        spoken.unlink()

    def digest(self) -> str:
        """Of what is trained on, and of nothing else in the folder: tokens and masks in order, and
        how often an epoch has each document; however they were made."""
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
        """Close the files; a second time does nothing."""
        for file in (*self._files, self._conversations, self._origins):
            file.close()


def _spoken_by(document: Document) -> list[int]:
    """Tokens and learned ones of each of `SPEAKERS`."""
    pairs = document.speakers * 2 + document.supervised
    kinds = np.bincount(pairs, minlength=2 * len(SPEAKERS)).reshape(-1, 2)
    counts: list[int] = np.stack([kinds.sum(axis=1), kinds[:, 1]], axis=1).ravel().tolist()
    return counts


def _beside(conversation: Conversation) -> tuple[str, ...]:
    return conversation.context, conversation.tools, conversation.text


def _prompt(conversation: Conversation) -> list[str]:
    opening = [str(message["content"]) for message in conversation.opening()]
    return [" ".join(text.split()).casefold() for text in opening or [conversation.text]]


def _digest(value: Any) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(value).encode()).digest()[:8], "big")


def _read(file: IO[bytes], start: int) -> Conversation:
    file.seek(start)
    return _conversation(file.readline())


def _conversation(line: bytes) -> Conversation:
    stored = json.loads(line)
    stored["turns"] = tuple(Turn(*turn) for turn in stored["turns"])
    stored["extra"] = tuple((key, value) for key, value in stored["extra"])
    return Conversation(**stored)
