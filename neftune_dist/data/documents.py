"""Tokenised documents on disk: written in their order, split, read by memory map.

The files of a cache entry. The tokens of all documents lie in two flat files. An index for either
part (train, held out) names the ranges that are its documents, in order and with repetitions, so
that a split copies no token. A reader maps all of it: its memory does not depend on the number of
documents. The writer holds some 100 bytes for a document, not the document.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np

from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.spans import SPEAKERS

_FILES = {"input_ids.bin": np.int32, "supervised.bin": np.uint8}
_CONVERSATIONS = "conversations.jsonl"  # those that may be held out, removed after the split
_HELD_OUT = "held_out.jsonl"
_ORIGINS = "origins.jsonl"
# The files of a shard's flat arrays.
_FLAT = dict(zip(("input_ids", "supervised"), _FILES, strict=True))
_FLAT |= {"conversations": _CONVERSATIONS, "origins": _ORIGINS}
# What is known of every document of all sources.
STATS = np.dtype(
    [
        ("lengths", np.int64),  # tokens
        ("num_supervised", np.int64),
        # Digest of the conversation. Two of 10 million different ones share one with a probability
        # of 3e-6.
        ("content", np.uint64),
        # Digest of the text before the first answer without the system prompt, in lower case and
        # with single spaces.
        ("prompt", np.uint64),
        ("end_learned", np.bool_),  # whether the end of the last supervised answer is supervised
        ("by_speaker", np.int32, (len(SPEAKERS), 2)),  # all and supervised tokens by speaker
        ("conversation_bytes", np.int64),  # 0 where it is not kept
        ("source", np.int64),  # index of the document's source
    ]
)


class Documents:
    """A part of the documents, in memory maps; cheap to open, whatever their number.

    Attributes:
        lengths, num_supervised: int64 (num_documents,), tokens.
        starts: int64 (num_documents,), where each document begins in the flat files.
        content: uint64 (num_documents,), digests of the conversations, as in `STATS`.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self._ids, self._supervised = (
            np.memmap(folder / name, dtype, mode="r") for name, dtype in _FILES.items()
        )
        index = np.load(folder / f"{part}.npy", mmap_mode="r")
        self.starts, self.lengths, self.num_supervised, self._numbers, content = index
        self.content = content.view(np.uint64)
        self._folder = folder

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """input_ids int32 and supervised uint8, (length,) each."""
        piece = slice(self.starts[index], self.starts[index] + self.lengths[index])
        return self._ids[piece], self._supervised[piece]

    def origin(self, index: int) -> tuple[int, str]:
        """The index of a document's source, and the document's place in it."""
        return origin(self._folder, int(self._numbers[index]))

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
        return Conversation(**stored)


class DocumentWriter:
    """Writes documents in their order into a new folder, then the index of either part."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {
            array: (folder / name).open("wb") for array, name in _FLAT.items()
        }
        self._stats = bytearray()

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the arrays of a `Shard`."""
        for name, file in self._files.items():
            file.write(arrays[name].data)
        self._stats += arrays["stats"].tobytes()

    def stats(self) -> np.ndarray:
        """`STATS` of all documents."""
        return np.frombuffer(self._stats, STATS)

    def write_parts(self, train: np.ndarray, held_out: np.ndarray) -> None:
        """Write the index of either part: int64 indices of documents, with repetitions."""
        stats = self.stats()
        lengths, content = stats["lengths"], stats["content"].view(np.int64)
        numbers, starts = np.arange(len(stats)), np.cumsum(lengths) - lengths
        columns = (starts, lengths, stats["num_supervised"], numbers, content)
        for part, chosen in (("train", train), ("held_out", held_out)):
            np.save(self._folder / f"{part}.npy", np.stack([column[chosen] for column in columns]))
        stored = self._folder / _CONVERSATIONS
        lines = stats["conversation_bytes"]
        begins = np.cumsum(lines) - lines
        with stored.open("rb") as every, (self._folder / _HELD_OUT).open("wb") as kept:
            for i in held_out:
                every.seek(begins[i])
                kept.write(every.read(lines[i]))
        stored.unlink()

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
        """Close the files: nothing more can be added."""
        for file in self._files.values():
            file.close()


def origin(folder: Path, number: int) -> tuple[int, str]:
    """The index of the source of the document that was written as `number`, and its place there."""
    with (folder / _ORIGINS).open(encoding="utf-8") as file:
        source, place = json.loads(next(islice(file, number, None)))
    return source, place
