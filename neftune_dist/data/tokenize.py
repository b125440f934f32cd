"""Conversations to tokens, with the mask of what is learned.

Owns the choice of the template and law 3's mask: which tokens are supervised is decided by
character spans of the rendered text, never by token ids, so that an end-of-turn token is learned
even where it equals the padding token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig, UserError, user_path
from neftune_dist.data import loss_mask, prompt_templates
from neftune_dist.data.chat_template import ChatTemplate, bounded, with_system
from neftune_dist.data.formats import Conversation, Turn
from neftune_dist.data.sources import BadRow
from neftune_dist.data.spans import SPEAKERS, TEXT, Chunk, Rendered, Span

# What a fixed prompt in Jinja is tried on.
_EXCHANGE = (Turn("user", "What is 2 + 3?\nSay it."), Turn("assistant", "It is 5."))
_TALK = (*_EXCHANGE, Turn("user", "And doubled?"), Turn("assistant", "10"))
_Pieces = tuple[np.ndarray, np.ndarray]
_ANY_ANSWER = "Yes."


@dataclass(frozen=True, eq=False)
class Document:
    """One document.

    input_ids: int32 (length,). supervised: uint8 (length,), 1 where the token is learned (never the
    first one). speakers: uint8 (length,), who says the token, as an index of `SPEAKERS`.
    end_learned: whether the token that ends the last learned answer is there and learned.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    speakers: np.ndarray
    end_learned: bool

    def cut(self, max_length: int) -> Document:
        """The first tokens of a document that is longer."""
        kept = slice(max_length)
        return Document(
            self.input_ids[kept], self.supervised[kept], self.speakers[kept], end_learned=False
        )


class ConversationTokenizer:
    """Renders and tokenises conversations as `data.template`, `data.supervise` and
    `data.system_prompt` say."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {name} gives no character offsets, which the loss mask needs: use "
                "a model with a tokenizer.json."
            )
        self._backend = _bare(tokenizer.backend_tokenizer)
        # What the tokenizer puts in front of a text. A chat template writes its own.
        probe = tokenizer("a", return_special_tokens_mask=True)
        num_special = probe["special_tokens_mask"].index(0)
        self._prefix = np.array(probe["input_ids"][:num_special], np.int32)
        self._chat: ChatTemplate | None = None
        if prompt_templates.is_fixed(config.template):
            prompt_templates.check_tokenizer(config.template, name, tokenizer.eos_token)
            return
        self._chat = ChatTemplate(tokenizer, _jinja(tokenizer, config.template, name))
        if config.system_prompt is not None and not self._chat.expresses_system():
            raise UserError(
                f"data.system_prompt cannot be used: the chat template of {name} takes no system "
                "prompt."
            )

    @cached_property
    def _literal(self) -> Any:
        """The tokenizer that reads no special token in a text."""
        literal = _bare(self.tokenizer.backend_tokenizer)
        literal.encode_special_tokens = True
        return literal

    def identity(self) -> dict[str, Any]:
        """All of the tokenizer that decides what a conversation becomes, as plain values."""
        return {
            "backend": self._backend.to_str(),
            "prefix": self._prefix.tolist(),
            "fixed_prompt": "" if self._chat else self.config.template,
            "chat_template": self._chat.source if self._chat else "",
            "special_tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
        }

    def render(self, conversation: Conversation) -> Rendered:
        """Text and spans. Raises `BadRow` where the template cannot express the turns."""
        if conversation.text:
            if self.tokenizer.eos_token_id is None:
                raise BadRow("the tokenizer has no end-of-sequence token, with which a text ends")
            span = Span(0, len(conversation.text), TEXT, learned=True)
            chunk = Chunk(conversation.text, (span,), starts=True, ends=True)
            return Rendered((chunk,), marks_end=True)
        return self._render(conversation, self.config.supervise)

    def prompt(self, conversation: Conversation) -> str:
        """The text in front of the first answer, as generation is given it."""
        return self._prompt(conversation).text

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The tokens of `prompt`: those that the document begins with."""
        chunk = self._prompt(conversation)
        [(ids, _)] = self._tokenize([chunk.text], chunk.literal)
        return [*(self._prefix.tolist() if chunk.starts else []), *ids.tolist()]

    def as_jinja(self) -> str | None:
        """The template as a chat template for whoever uses the trained model: what it makes of a
        conversation are the tokens of the document (what looks like a special token is one there;
        and no tokens are kept apart where a prompt ends).

        None where this tokenizer reads a text behind a special token otherwise than the text alone.
        """
        said = self.config.system_prompt
        if self._chat is not None:
            return self._chat.given if said is None else with_system(self._chat.given, said)
        prefix = "".join(self.tokenizer.convert_ids_to_tokens(self._prefix.tolist()))
        alone = self.config.template == "alpaca"
        talks = [_EXCHANGE] if alone else [_TALK, (Turn("system", "Be\nbrief."), *_TALK)]
        for gap in ("", " "):
            source = prompt_templates.as_jinja(
                self.config.template,
                prefix=prefix,
                end=self.tokenizer.eos_token,
                gap=gap,
                system=said,
            )
            if all(self._is_made_by(source, Conversation(turns)) for turns in talks):
                return source
        return None

    def reply_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens in front of the answer to the last turn: those behind which it is learned,
        earlier answers among them. Raises `BadRow` where the template cannot express the turns."""
        conversation = Conversation((*turns, Turn("assistant", _ANY_ANSWER)))
        try:
            rendered = self._render(conversation, "assistant")
        except BadRow:  # an earlier answer cannot be told apart, which is not asked for here
            rendered = self._render(conversation, "last")
        [document] = self.encode([rendered])
        answered = document.speakers == SPEAKERS.index("assistant")
        begins = np.flatnonzero(answered[1:] & ~answered[:-1]) + 1
        reply: list[int] = document.input_ids[: begins[-1]].tolist()
        return reply

    def encode(self, rendered: Sequence[Rendered]) -> list[Document]:
        """Tokens and masks, in few calls of the tokenizer."""
        pieces = self._encode_chunks([chunk for each in rendered for chunk in each.chunks])
        documents = []
        for each in rendered:
            encoded = [next(pieces) for _ in each.chunks]
            ids, supervised, speakers = (
                np.concatenate(part) for part in zip(*encoded, strict=True)
            )
            if self.config.supervise == "all":
                supervised = np.ones_like(supervised)
            supervised[:1] = 0  # nothing comes before it that could predict it
            documents.append(Document(ids, supervised, speakers, each.marks_end))
        return documents

    def _is_made_by(self, source: str, conversation: Conversation) -> bool:
        [document] = self.encode([self.render(conversation)])
        made = self.tokenizer.apply_chat_template(
            conversation.messages(), chat_template=source, return_dict=False
        )
        return bool(made == document.input_ids.tolist())

    def _prompt(self, conversation: Conversation) -> Chunk:
        conversation = self._with_system(conversation)
        if self._chat is not None:
            return Chunk(self._chat.prompt(conversation), ())
        first = prompt_templates.render(self.config.template, conversation, last_only=False).chunks[
            0
        ]
        begin = next(span.begin for span in first.spans if span.speaker == "assistant")
        return replace(first, text=first.text[:begin], spans=(), ends=False)

    def _render(self, conversation: Conversation, supervise: str) -> Rendered:
        conversation = self._with_system(conversation)
        if self._chat is not None:
            with bounded():  # all that the template makes of one conversation
                return loss_mask.render(self._chat, conversation, supervise)
        return prompt_templates.render(
            self.config.template, conversation, last_only=supervise == "last"
        )

    def _with_system(self, conversation: Conversation) -> Conversation:
        said = self.config.system_prompt
        if said is None or any(turn.role == "system" for turn in conversation.turns):
            return conversation
        return replace(conversation, turns=(Turn("system", said), *conversation.turns))

    def _encode_chunks(
        self, chunks: Sequence[Chunk]
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each chunk: input_ids, supervised, speakers, each (length,)."""
        encoded = {
            literal: iter(self._tokenize([c.text for c in chunks if c.literal == literal], literal))
            for literal in (False, True)
        }
        for chunk in chunks:
            ids, offsets = next(encoded[chunk.literal])
            begins = sorted(span.begin for span in chunk.spans if span.learned)
            cuts = [begin for begin in begins if _is_joined(chunk.text, offsets, begin)]
            if cuts:
                ids, offsets = self._tokenize_in_pieces(chunk.text, cuts, chunk.literal)
            supervised, speakers = _painted(offsets, chunk.spans)
            prefix, end = self._prefix, self.tokenizer.eos_token_id
            if chunk.starts and ids[: len(prefix)].tolist() != prefix.tolist():
                ids = np.concatenate([prefix, ids])
                supervised = np.concatenate([np.zeros(len(prefix), np.uint8), supervised])
                speakers = np.concatenate([np.zeros(len(prefix), np.uint8), speakers])
            if chunk.ends and ids[-1:].tolist() != [end]:
                last = chunk.spans[-1]
                ids = np.append(ids, np.int32(end))
                supervised = np.append(supervised, np.uint8(last.learned))
                speakers = np.append(speakers, np.uint8(SPEAKERS.index(last.speaker)))
            yield ids, supervised, speakers

    def _tokenize(self, texts: list[str], literal: bool) -> list[_Pieces]:
        """Of each text, without special tokens around it: input_ids int32 (length,) and half-open
        character offsets int64 (length, 2)."""
        backend = self._literal if literal else self._backend
        return [
            (np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2))
            for e in backend.encode_batch(texts, add_special_tokens=False)
        ]

    def _tokenize_in_pieces(self, text: str, cuts: list[int], literal: bool) -> _Pieces:
        """As `_tokenize`, with no token across a cut. A token that holds the prompt's end and the
        answer's beginning (':"' with the Alpaca prompt) could be neither learned nor generated."""
        ids, offsets = [], []
        for first, last in pairwise([0, *cuts, len(text)]):
            [(piece_ids, piece_offsets)] = self._tokenize([text[first:last]], literal)
            if first:
                # Tokenizers made from sentencepiece put a space in front of whatever they are
                # given: a line break takes it, unless one token holds the break and more.
                [(broken_ids, broken)] = self._tokenize(["\n" + text[first:last]], literal)
                if not _inside_token(broken, 1):
                    kept = broken[:, 0] >= 1
                    piece_ids, piece_offsets = broken_ids[kept], broken[kept] - 1
            ids.append(piece_ids)
            offsets.append(piece_offsets + first)
        return np.concatenate(ids), np.concatenate(offsets)


def _bare(backend: Any) -> Any:
    """The tokenizer without a post-processor: special tokens are put in here, and some
    post-processors take spaces off the offsets, which would hide who said them."""
    bare = type(backend).from_str(backend.to_str())
    bare.post_processor = None
    bare.no_truncation()
    bare.no_padding()
    return bare


def _jinja(tokenizer: Any, template: str, name: str) -> str:
    if template != "chat":
        try:
            with bounded():
                return user_path(template, "data.template").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"data.template={template} cannot be read: {reason}.") from error
    try:
        own: str = tokenizer.get_chat_template()
    except ValueError as error:
        raise UserError(
            f"The tokenizer {name} has no chat template: set data.template=alpaca, vicuna, llama2 "
            "or the path of a .jinja file, or use a model that has one."
        ) from error
    return own


def _inside_token(offsets: np.ndarray, place: int) -> bool:
    """Whether one token holds characters on both sides of a place in the text."""
    return bool(np.any((offsets[:, 0] < place) & (place < offsets[:, 1])))


def _is_joined(text: str, offsets: np.ndarray, begin: int) -> bool:
    """Whether what an answer begins with changes the tokens in front of it, which would then not
    be those of the prompt alone: by a token that holds both, or because the prompt ends in much
    white space, whose tokens in many tokenizers depend on whether a word follows."""
    return _inside_token(offsets, begin) or (begin > 1 and text[begin - 2 : begin].isspace())


def _painted(offsets: np.ndarray, spans: Sequence[Span]) -> _Pieces:
    """supervised and speakers, each uint8 (length,). A learned span has the tokens that begin in
    it; any other those that end in it, for their first one may begin with a space in front."""
    first, last = offsets[:, 0], offsets[:, 1] - 1
    supervised, speakers = np.zeros(len(offsets), np.uint8), np.zeros(len(offsets), np.uint8)
    for span in spans:
        place = first if span.learned else last
        inside = (span.begin <= place) & (place < span.end)
        supervised[inside] = span.learned
        speakers[inside] = SPEAKERS.index(span.speaker)
    return supervised, speakers
