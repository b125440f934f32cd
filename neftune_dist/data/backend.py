"""What tokenises a text: the tokenizer that a fast one of transformers wraps, or one in Python
behind the same interface. Neither adds tokens to the text."""

from __future__ import annotations

import hashlib
import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from neftune_dist.data.errors import BadRow

_MOST_TOKENS = 64  # that are placed together: the bytes of a character, the pieces of a word


def backend_of(tokenizer: Any, literal: bool = False) -> Any:
    """What tokenises for a tokenizer of transformers. It is shared between callers.

    Args:
        tokenizer: a fast one, or one in Python.
        literal: whether special tokens in a text are read as plain text.
    """
    if not tokenizer.is_fast:
        return SlowBackend(tokenizer, literal)
    return _parsed(tokenizer.backend_tokenizer.to_str(), literal)


# Parsing takes a tenth of a second to a second, by the vocabulary; a verb needs the same two often.
@lru_cache(maxsize=4)
def _parsed(text: str, literal: bool) -> Any:
    """A tokenizer without a post-processor: special tokens are added by `tokenize`, and some
    post-processors strip spaces from the offsets, which would hide their speaker."""
    made: Any = Tokenizer.from_str(text)
    made.post_processor = None
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = literal
    return made


def prefix_ids(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text: a letter, or a token's text where it knows
    no letter."""
    for text in ("a", *(tokenizer.decode([i]) for i in range(min(1000, len(tokenizer))))):
        try:
            ids: list[int] = tokenizer(text)["input_ids"]
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception:  # outside the vocabulary of one without an unknown token
            continue
        places = range(len(ids) - len(own) + 1)
        if own and (found := [i for i in places if ids[i : i + len(own)] == own]):
            return ids[: found[0]]
    return []


def exact_offsets(text: str, encoding: Any) -> np.ndarray:
    """Half-open character offsets of the tokens of a text, int64 (length, 2). A Unigram model gives
    every byte of a run of unknown characters the offsets of the run; here it has its character's.
    """
    offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    first, last = offsets.T
    shared = (last[1:] - first[1:] > 1) & (first[1:] == first[:-1])
    if not shared.any():
        return offsets
    tokens = encoding.tokens
    for begin, end in np.unique(offsets[1:][shared], axis=0):
        start, stop = np.searchsorted(first, [begin, end])  # where a token of a space may be, too
        run = slice(start + np.flatnonzero(last[start:stop] == end)[0], stop)
        said = [character.encode() for character in text[begin:end]]
        if tokens[run] == [f"<0x{byte:02X}>" for byte in b"".join(said)]:
            place = begin + np.repeat(np.arange(len(said)), [*map(len, said)])
            offsets[run] = np.stack([place, place + 1], axis=1)
    return offsets


def unknown_character(backend: Any, text: str) -> str:
    """The first character outside the vocabulary, for a tokenizer that drops such characters
    without a trace, which also shifts the offsets of all that follow; "" without one."""
    for token in backend.get_added_tokens_decoder().values():
        text = text.replace(token.content, "")
    normalised = backend.normalizer.normalize_str(text) if backend.normalizer else text
    splits = backend.pre_tokenizer is not None  # and drops white space itself
    known = backend.get_vocab()
    unknown = (c for c in normalised if c not in known and not (splits and c.isspace()))
    return next(unknown, "")


def may_refuse(backend: Any) -> bool:
    """Whether a text may have no tokens: characters or words outside the vocabulary are an error
    without an unknown token, and one in Python may change the text."""
    if isinstance(backend, SlowBackend):
        return True
    try:
        backend.encode("\U0010fffd")
    except Exception:  # pyo3 has no type for it
        return True
    return False


def drops_characters(backend: Any) -> bool:
    """Whether a character outside the vocabulary becomes no token: no unknown one, no bytes."""
    model, before = backend.model, (str(backend.pre_tokenizer), str(backend.normalizer))
    is_bpe = type(model).__name__ == "BPE"
    has_bytes = model.byte_fallback if is_bpe else False
    has_bytes = has_bytes or any("ByteLevel" in part for part in before)
    return is_bpe and model.unk_token is None and not has_bytes


class _Encoding(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]
    tokens: list[str]


class SlowBackend:
    """A tokenizer in Python, which gives no character offsets, behind the interface of a fast one.

    Where its tokens stand is found by their texts, in order. A text that they do not spell, up to
    white space, is a `BadRow`: its mask would be a guess.

    Args:
        tokenizer: of transformers.
        literal: whether special tokens in a text are read as plain text.
    """

    def __init__(self, tokenizer: Any, literal: bool = False) -> None:
        self._tokenizer, self._literal = tokenizer, literal

    def to_str(self) -> str:
        """A digest of the vocabulary and of the files that make it."""
        tokenizer = self._tokenizer
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)
            files = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        named = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), added]
        total = hashlib.sha256(json.dumps(named).encode())
        for content in files:
            total.update(hashlib.sha256(content).digest())
        return total.hexdigest()

    def encode_batch(self, texts: list[str], add_special_tokens: bool = False) -> list[_Encoding]:
        """The tokens of every text, without special ones around it. Raises `BadRow`."""
        assert not add_special_tokens
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> _Encoding:
        tokens = self._tokenizer.tokenize(text, split_special_tokens=self._literal)
        ids = self._tokenizer.convert_tokens_to_ids(tokens)
        # Outside the vocabulary only the token says its text; of a space only the id may (<SP>).
        spellings = tokens, self._tokenizer.convert_ids_to_tokens(ids)

        def said(first: int, last: int) -> list[str]:
            return [self._tokenizer.convert_tokens_to_string(s[first:last]) for s in spellings]

        offsets: list[tuple[int, int]] = []
        place = 0
        while len(offsets) < len(tokens):
            first = len(offsets)
            for last in range(first + 1, min(first + _MOST_TOKENS, len(tokens)) + 1):
                places = [_place(text, place, words) for words in said(first, last)]
                if found := places[0] or places[1]:
                    break
            else:
                break
            # A token of white space before the words, which adds nothing to them, has its place.
            while place < found[0] and any(
                _place(text, found[0], words) == found for words in said(first + 1, last)
            ):
                offsets.append((place, place + 1))
                first, place = first + 1, place + 1
            offsets += [found] * (last - first)
            place = found[1]
        is_said = not text[place:].strip()
        if is_said and any(not words.strip() for words in said(len(offsets), len(tokens))):
            offsets += [(place, len(text))] * (len(tokens) - len(offsets))
        if len(offsets) < len(tokens) or not is_said:
            raise BadRow(
                "the tokenizer, which is written in Python, changes the text at "
                f"{text[place : place + 20].strip()!a}, so the supervised tokens cannot be told "
                "apart: use a model with a tokenizer.json"
            )
        return _Encoding(ids, offsets, tokens)


def _place(text: str, place: int, said: str) -> tuple[int, int] | None:
    """Where the next tokens stand, which say a text: as it is, or without white space around it."""
    if not said or "\ufffd" in said:  # a part of a character
        return None
    if text.startswith(said, place):
        return place, place + len(said)
    begin = len(text) - len(text[place:].lstrip())
    core = said.strip()
    return (begin, begin + len(core)) if text.startswith(core, begin) else None
