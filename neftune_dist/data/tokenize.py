"""Conversations to tokens with their loss mask.

Chooses the template, and makes law 3's mask: the supervised tokens are decided by character spans
of the rendered text, never by token ids, so that an end-of-turn token is supervised even where it
equals the padding token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data import prompt_templates
from neftune_dist.data.backend import (
    backend_of,
    drops_characters,
    exact_offsets,
    may_refuse,
    prefix_ids,
    unknown_character,
)
from neftune_dist.data.chat_template import ChatTemplate, bounded, read_template, with_system
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.loss_mask import LossMask
from neftune_dist.data.spans import SPEAKERS, TEXT, Chunk, Rendered, Span
from neftune_dist.system.text import first_line

# Conversations on which a fixed prompt in Jinja is compared with the tokens made here.
_EXCHANGE = (Turn("user", "What is 2 + 3?\nSay it."), Turn("assistant", "It is 5."))
_TALK = (*_EXCHANGE, Turn("user", "And doubled?"), Turn("assistant", "10"))
_Pieces = tuple[np.ndarray, np.ndarray]
_ANY_ANSWER = "Yes."
_TAG = re.compile(r"<[^<>\s]+>")  # as templates write special tokens


@dataclass(frozen=True, eq=False)
class Document:
    """The tokens of one conversation or text.

    Attributes:
        input_ids: int32 (length,).
        supervised: uint8 (length,), 1 for a supervised token; the first one never is.
        speakers: uint8 (length,), index in `SPEAKERS` of who says the token.
        end_learned: whether the token that ends the last supervised answer is supervised.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    speakers: np.ndarray
    end_learned: bool

    def cut(self, max_length: int) -> Document:
        """The first `max_length` tokens of a longer document."""
        kept = slice(max_length)
        return Document(
            self.input_ids[kept], self.supervised[kept], self.speakers[kept], end_learned=False
        )


class ConversationTokenizer:
    """Renders and tokenises conversations by `data.template`, `data.supervise` and
    `data.system_prompt`."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        name = tokenizer.name_or_path or type(tokenizer).__name__
        self._backend = backend_of(tokenizer)
        self._drops_characters = tokenizer.is_fast and drops_characters(self._backend)
        self._may_refuse = may_refuse(self._backend)
        # What the tokenizer puts before a text. A chat template writes its own.
        self._prefix = np.array(prefix_ids(tokenizer), np.int32)
        self._chat: ChatTemplate | None = None
        if fixed := prompt_templates.NAMES.get(config.template):
            if tokenizer.eos_token is None:
                raise UserError(
                    f"The tokenizer {name} has no end-of-sequence token, with which the {fixed} "
                    "prompt's answers end."
                )
            return
        self._chat = ChatTemplate(tokenizer, read_template(tokenizer, config.template, name))
        self._mask = LossMask(self._chat)
        if config.system_prompt is not None and not self._chat.expresses_system():
            raise UserError(
                f"data.system_prompt cannot be used: the chat template of {name} takes no system "
                "prompt."
            )

    @cached_property
    def _literal(self) -> Any:
        """The tokenizer that reads special tokens in a text as plain text."""
        return backend_of(self.tokenizer, literal=True)

    def identity(self) -> dict[str, Any]:
        """All properties that decide the tokens of a conversation, as plain values."""
        return {
            "backend": self._backend.to_str(),
            "prefix": self._prefix.tolist(),
            "fixed_prompt": "" if self._chat else self.config.template,
            "chat_template": self._chat.source if self._chat else "",
            "special_tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
        }

    def documents(self, conversation: Conversation) -> list[tuple[Conversation, Rendered]]:
        """The documents of a row, each with the conversation that it is: several where
        `data.split_conversations` allows it and the template needs it.

        Raises:
            BadRow: the template cannot express the turns.
        """
        if conversation.text:
            if self.tokenizer.eos_token_id is None:
                raise BadRow("the tokenizer has no end-of-sequence token, with which a text ends")
            spans = (Span(0, len(conversation.text), TEXT, learned=True),)
            chunk = Chunk(conversation.text, spans, starts=True, ends=True)
            found = [(conversation, Rendered((chunk,)))]
        else:
            found = self._documents(conversation, self.config.supervise)
        text, end = found[-1][1].text, self.tokenizer.eos_token or ""
        conversation.refuse_templated(found[-1][1].with_ends(end), end)
        if self._drops_characters and (unknown := unknown_character(self._backend, text)):
            raise BadRow(f"the tokenizer has no token for {unknown!a}")
        if self._may_refuse:
            self.encode([rendered for _, rendered in found])
        return found

    def render(self, conversation: Conversation) -> Rendered:
        """The text of the whole conversation with spans; `BadRow` as `documents`."""
        return self.documents(conversation)[-1][1]

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The tokens before the first answer, as its document begins."""
        *asked, answer = conversation.turns[: len(conversation.opening()) + 1]
        turns = (*asked, answer._replace(learned=True))
        return self._before_last_answer(replace(conversation, turns=turns))

    def reply_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens before the answer to the last turn, as training sees them, earlier answers
        included. Raises `BadRow` where the template cannot express the turns."""
        return self._before_last_answer(Conversation((*turns, Turn("assistant", _ANY_ANSWER))))

    def _before_last_answer(self, conversation: Conversation) -> list[int]:
        try:
            documents = self._documents(conversation, "assistant")
        except BadRow:  # the span of an earlier answer is not found, and not needed here
            documents = self._documents(conversation, "last")
        [document] = self.encode([documents[-1][1]])
        answered = document.speakers == SPEAKERS.index("assistant")
        begins = np.flatnonzero(answered[1:] & ~answered[:-1]) + 1
        ids: list[int] = document.input_ids[: begins[-1]].tolist()
        return ids

    def as_jinja(self) -> str | None:
        """The template as a chat template for users of the trained model.

        It renders a conversation as the document's tokens, except that text like a special token
        becomes that token, and that a token may hold the end of a prompt with the answer's start.

        Returns:
            The program, or None where the tokenizer splits a text after a special token differently
            from the text alone.
        """
        system = self.config.system_prompt
        if self._chat is not None:
            return self._chat.given if system is None else with_system(self._chat.given, system)
        prefix = "".join(self.tokenizer.convert_ids_to_tokens(self._prefix.tolist()))
        alone = self.config.template == "alpaca"
        talks = [_EXCHANGE] if alone else [_TALK, (Turn("system", "Be\nbrief."), *_TALK)]
        for gap in ("", " "):
            source = prompt_templates.as_jinja(
                self.config.template, prefix, self.tokenizer.eos_token, gap, system
            )
            if all(self._is_made_by(source, Conversation(turns)) for turns in talks):
                return source
        return None

    def encode(self, rendered: Sequence[Rendered]) -> list[Document]:
        """Tokenise rendered conversations together, in few calls of the tokenizer."""
        pieces = self._encode_chunks([chunk for item in rendered for chunk in item.chunks])
        documents = []
        for item in rendered:
            encoded = [next(pieces) for _ in item.chunks]
            ids, supervised, speakers = (
                np.concatenate(part) for part in zip(*encoded, strict=True)
            )
            if self.config.supervise == "all":
                supervised |= speakers != SPEAKERS.index("assistant")
            supervised[:1] = 0  # no token precedes it that could predict it
            end_learned = self._ends(ids, supervised, speakers)
            documents.append(Document(ids, supervised, speakers, end_learned))
        return documents

    @cached_property
    def end_of_turn(self) -> tuple[list[int], str]:
        """The tokens at which generation is to stop (the end-of-sequence token, and the added
        token with which the template ends an answer), and why it has none, else ""."""
        own = [] if self.tokenizer.eos_token_id is None else [int(self.tokenizer.eos_token_id)]
        if self._chat is None:
            return own, ""
        probe = Conversation((Turn("user", "Say yes."), Turn("assistant", _ANY_ANSWER)))
        try:
            [chunk] = self._documents(probe, "last")[-1][1].chunks
        except BadRow:  # the rows are reported
            return own, ""
        begin, end = chunk.spans[-1][:2]
        tail = chunk.text[begin:end].rpartition(_ANY_ANSWER)[2].strip()
        try:
            [(ids, _)] = self._tokenize([tail], literal=False)
        except BadRow:
            ids = np.zeros(0, np.int32)
        last, known = int(ids[-1]) if len(ids) else -1, self.tokenizer.added_tokens_decoder
        if last in own or last in known:
            return sorted({*own, last}), ""
        if not tail:
            return own, "the chat template writes nothing after an answer"
        tags = dict.fromkeys(_TAG.findall(chunk.text))
        lacking = ",".join(tag for tag in tags if tag not in self.tokenizer.get_vocab())
        advice = f": model.add_tokens='{lacking}' makes it one" if lacking else ""
        return own, f"the chat template ends an answer with {tail}, which is no token{advice}"

    def _ends(self, ids: np.ndarray, supervised: np.ndarray, speakers: np.ndarray) -> bool:
        """Whether an end token is supervised at the end of the last supervised answer or text."""
        learned = supervised.nonzero()[0]
        if not len(learned):
            return False
        ends = self.end_of_turn[0]
        if self.config.supervise != "all":
            return int(ids[learned[-1]]) in ends
        said = np.isin(speakers[learned], [SPEAKERS.index("assistant"), SPEAKERS.index(TEXT)])
        tail = learned[said.nonzero()[0][-1] :] if said.any() else learned[:0]
        return bool(np.isin(ids[tail], ends).any())

    def _is_made_by(self, source: str, conversation: Conversation) -> bool:
        try:
            [document] = self.encode([self.render(conversation)])
        except BadRow:  # the tokenizer does not know a digit, say, which the rows have not
            return False
        made = self.tokenizer.apply_chat_template(
            conversation.messages(), chat_template=source, return_dict=False
        )
        return bool(made == document.input_ids.tolist())

    def _documents(
        self, conversation: Conversation, supervise: str
    ) -> list[tuple[Conversation, Rendered]]:
        view, system = conversation, self.config.system_prompt
        if system is not None and all(turn.role != "system" for turn in conversation.turns):
            view = replace(conversation, turns=(Turn("system", system), *conversation.turns))
        if self._chat is None:
            rendered = prompt_templates.render(
                self.config.template, view, last_only=supervise == "last"
            )
            return [(conversation, rendered)]
        may_split = self.config.split_conversations == "as_needed"
        with bounded():  # over all renderings of one conversation
            found = self._mask.documents(view, supervise, may_split)
        if view is conversation:
            return found
        return [(replace(part, turns=part.turns[1:]), item) for part, item in found]

    def _encode_chunks(
        self, chunks: Sequence[Chunk]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """input_ids, supervised and speakers of every chunk, (length,) each."""
        encoded = {
            literal: iter(self._tokenize([c.text for c in chunks if c.literal == literal], literal))
            for literal in (False, True)
        }
        for chunk in chunks:
            ids, offsets = next(encoded[chunk.literal])
            cuts = [begin for begin in chunk.cuts if _is_joined(chunk.text, offsets, begin)]
            if cuts:
                ids, offsets = self._tokenize_in_pieces(chunk.text, cuts, chunk.literal)
            supervised, speakers = _masks(offsets, chunk.spans)
            prefix, end = self._prefix, self.tokenizer.eos_token_id
            if chunk.starts and ids[: len(prefix)].tolist() != prefix.tolist():
                ids = np.concatenate([prefix, ids])
                supervised, speakers = (np.pad(m, (len(prefix), 0)) for m in (supervised, speakers))
            if chunk.ends and ids[-1:].tolist() != [end]:
                last = chunk.spans[-1]
                ids = np.append(ids, np.int32(end))
                supervised = np.append(supervised, np.uint8(last.learned))
                speakers = np.append(speakers, np.uint8(SPEAKERS.index(last.speaker)))
            yield ids, supervised, speakers

    def _tokenize(self, texts: list[str], literal: bool) -> list[_Pieces]:
        """input_ids int32 (length,) of every text, without special tokens around it, and half-open
        character offsets int64 (length, 2)."""
        backend = self._literal if literal else self._backend
        try:
            encoded = backend.encode_batch(texts, add_special_tokens=False)
        except BadRow:
            raise
        except Exception as error:  # pyo3 has no type for it
            raise BadRow(f"the tokenizer refuses the text: {first_line(error)}") from error
        pairs = zip(texts, encoded, strict=True)
        return [(np.array(e.ids, np.int32), exact_offsets(text, e)) for text, e in pairs]

    def _tokenize_in_pieces(self, text: str, cuts: list[int], literal: bool) -> _Pieces:
        """As `_tokenize`, with no token across a cut. A token of the prompt's end and the answer's
        start (':"' with the Alpaca prompt) could be neither learned nor generated."""
        ids, offsets = [], []
        for first, last in pairwise([0, *cuts, len(text)]):
            [(piece_ids, piece_offsets)] = self._tokenize([text[first:last]], literal)
            if first:
                # Tokenizers made from sentencepiece put a space before any text: a line break
                # takes it, or a letter where unknown characters are joined, as a break may be.
                for before in "\na":
                    [(broken_ids, broken)] = self._tokenize([before + text[first:last]], literal)
                    if not _inside_token(broken, 1):
                        kept = broken[:, 0] >= 1
                        piece_ids, piece_offsets = broken_ids[kept], broken[kept] - 1
                        break
            ids.append(piece_ids)
            offsets.append(piece_offsets + first)
        return np.concatenate(ids), np.concatenate(offsets)


def _inside_token(offsets: np.ndarray, place: int) -> bool:
    """Whether a token has characters on both sides of a place in the text."""
    return bool(np.any((offsets[:, 0] < place) & (place < offsets[:, 1])))


def _is_joined(text: str, offsets: np.ndarray, begin: int) -> bool:
    """Whether the start of an answer may change the tokens of the prompt before it: a token has
    characters of both, or the prompt ends in much white space, which many tokenizers split
    differently when a word follows."""
    return _inside_token(offsets, begin) or (begin > 1 and text[begin - 2 : begin].isspace())


def _masks(offsets: np.ndarray, spans: Sequence[Span]) -> _Pieces:
    """supervised and speakers of tokens, uint8 (length,) each. A learned span has the tokens that
    begin in it; any other span those that end in it, as its first may begin with a space before.
    """
    first, last = offsets[:, 0], offsets[:, 1] - 1
    supervised, speakers = np.zeros(len(offsets), np.uint8), np.zeros(len(offsets), np.uint8)
    for span in spans:
        place = first if span.learned else last
        inside = (span.begin <= place) & (place < span.end)
        supervised[inside] = span.learned
        speakers[inside] = SPEAKERS.index(span.speaker)
    return supervised, speakers
