"""A conversation as text: what every template makes of it, whether fixed or a model's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from neftune_dist.data.formats import ROLES

FRAME = "template"  # headers, special tokens, a system prompt of the template's own
TEXT = "text"  # of a document without turns
SPEAKERS = (FRAME, *ROLES, TEXT)


class Span(NamedTuple):
    """Half-open range of a text's characters, and who of `SPEAKERS` says them."""

    begin: int
    end: int
    speaker: str
    learned: bool = False


@dataclass(frozen=True)
class Chunk:
    """Text that is tokenised on its own.

    spans: who says what; the template says what lies outside them, and where two overlap, the later
        one holds.
    starts: what the tokenizer itself puts in front of a text goes in front of this one.
    ends: the end-of-sequence token goes behind it, as a part of the last span.
    literal: what looks like a special token is plain text.
    """

    text: str
    spans: tuple[Span, ...]
    starts: bool = False
    ends: bool = False
    literal: bool = False


@dataclass(frozen=True)
class Rendered:
    """A conversation's chunks, one behind the other.

    marks_end: whether something learned marks the end of the last answer that is learned.
    """

    chunks: tuple[Chunk, ...]
    marks_end: bool

    @property
    def text(self) -> str:
        """All of it, without the tokens that `starts` and `ends` add."""
        return "".join(chunk.text for chunk in self.chunks)
