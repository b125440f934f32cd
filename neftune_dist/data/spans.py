"""A rendered conversation: chunks of text, with spans for speakers and supervision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from neftune_dist.data.conversation import ROLES

FRAME = "template"  # headers, special tokens, the template's default system prompt
TEXT = "text"  # a document without turns
SPEAKERS = (FRAME, *ROLES, TEXT)


class Span(NamedTuple):
    """Half-open range of characters said by one of `SPEAKERS`, supervised where `learned`."""

    begin: int
    end: int
    speaker: str
    learned: bool = False


@dataclass(frozen=True)
class Chunk:
    """Text that is tokenised separately.

    Attributes:
        spans: text outside them is the template's; of two that overlap, the later one counts.
        starts: the tokenizer's own prefix (BOS) is put in front.
        ends: the end-of-sequence token is appended, as a part of the last span.
        literal: special tokens in the text are read as plain text.
        cuts: where answers begin: no token has characters from both sides.
    """

    text: str
    spans: tuple[Span, ...]
    starts: bool = False
    ends: bool = False
    literal: bool = False
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """The chunks of a conversation, in order."""

    chunks: tuple[Chunk, ...]

    @property
    def text(self) -> str:
        """The whole text, without the tokens that `starts` and `ends` add."""
        return "".join(chunk.text for chunk in self.chunks)

    def with_ends(self, eos: str) -> str:
        """The whole text, with the end-of-sequence tokens that are appended."""
        ends = (c.ends and (c.literal or not c.text.endswith(eos)) for c in self.chunks)
        return "".join(c.text + eos * end for c, end in zip(self.chunks, ends, strict=True))
