"""Conversations to tokens with their loss mask.

Chooses the template, and makes law 3's mask: the supervised tokens are decided by character spans
of the rendered text, never by token ids, so that an end-of-turn token is supervised even where it
equals the padding token.
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
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.spans import SPEAKERS, TEXT, Chunk, Rendered, Span

# Conversations on which a fixed prompt in Jinja is compared with the tokens made here.
_EXCHANGE = (Turn("user", "What is 2 + 3?\nSay it."), Turn("assistant", "It is 5."))
_TALK = (*_EXCHANGE, Turn("user", "And doubled?"), Turn("assistant", "10"))
_Pieces = tuple[np.ndarray, np.ndarray]
_ANY_ANSWER = "Yes."


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
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {name} gives no character offsets, which the loss mask needs: use "
                "a model with a tokenizer.json."
            )
        self._backend = _bare(tokenizer.backend_tokenizer)
        # The tokens that the tokenizer puts before a text. A chat template writes its own.
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
        """The tokenizer that reads special tokens in a text as plain text."""
        literal = _bare(self.tokenizer.backend_tokenizer)
        literal.encode_special_tokens = True
        return literal

    def identity(self) -> dict[str, Any]:
        """All properties that decide the tokens of a conversation, as plain values."""
        return {
            "backend": self._backend.to_str(),
            "prefix": self._prefix.tolist(),
            "fixed_prompt": "" if self._chat else self.config.template,
            "chat_template": self._chat.source if self._chat else "",
            "special_tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
        }

    def render(self, conversation: Conversation) -> Rendered:
        """The text of a conversation with spans. Raises `BadRow` where the template cannot express
        its turns."""
        if conversation.text:
            if self.tokenizer.eos_token_id is None:
                raise BadRow("the tokenizer has no end-of-sequence token, with which a text ends")
            span = Span(0, len(conversation.text), TEXT, learned=True)
            chunk = Chunk(conversation.text, (span,), starts=True, ends=True)
            return Rendered((chunk,), marks_end=True)
        return self._render(conversation, self.config.supervise)

    def prompt(self, conversation: Conversation) -> str:
        """The prompt for the first answer, as text."""
        return self._prompt(conversation).text

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The prompt for the first answer, as the tokens that the document begins with."""
        chunk = self._prompt(conversation)
        [(ids, _)] = self._tokenize([chunk.text], chunk.literal)
        return [*(self._prefix.tolist() if chunk.starts else []), *ids.tolist()]

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
                self.config.template,
                prefix=prefix,
                end=self.tokenizer.eos_token,
                gap=gap,
                system=system,
            )
            if all(self._is_made_by(source, Conversation(turns)) for turns in talks):
                return source
        return None

    def reply_ids(self, turns: Sequence[Turn]) -> list[int]:
        """The tokens before the answer to the last turn, as training sees them, earlier answers
        included. Raises `BadRow` where the template cannot express the turns."""
        conversation = Conversation((*turns, Turn("assistant", _ANY_ANSWER)))
        try:
            rendered = self._render(conversation, "assistant")
        except BadRow:  # the span of an earlier answer is not found, and not needed here
            rendered = self._render(conversation, "last")
        [document] = self.encode([rendered])
        answered = document.speakers == SPEAKERS.index("assistant")
        begins = np.flatnonzero(answered[1:] & ~answered[:-1]) + 1
        reply: list[int] = document.input_ids[: begins[-1]].tolist()
        return reply

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
            documents.append(Document(ids, supervised, speakers, item.marks_end))
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
        rendered = prompt_templates.render(self.config.template, conversation, last_only=False)
        first = rendered.chunks[0]
        begin = next(span.begin for span in first.spans if span.speaker == "assistant")
        return replace(first, text=first.text[:begin], spans=(), ends=False)

    def _render(self, conversation: Conversation, supervise: str) -> Rendered:
        conversation = self._with_system(conversation)
        if self._chat is not None:
            with bounded():  # over all renderings of one conversation
                return loss_mask.render(self._chat, conversation, supervise)
        return prompt_templates.render(
            self.config.template, conversation, last_only=supervise == "last"
        )

    def _with_system(self, conversation: Conversation) -> Conversation:
        system = self.config.system_prompt
        if system is None or any(turn.role == "system" for turn in conversation.turns):
            return conversation
        return replace(conversation, turns=(Turn("system", system), *conversation.turns))

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
            learned = () if self.config.supervise == "all" else chunk.spans
            begins = sorted(span.begin for span in learned if span.learned)
            cuts = [begin for begin in begins if _is_joined(chunk.text, offsets, begin)]
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
        return [
            (np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2))
            for e in backend.encode_batch(texts, add_special_tokens=False)
        ]

    def _tokenize_in_pieces(self, text: str, cuts: list[int], literal: bool) -> _Pieces:
        """As `_tokenize`, with no token across a cut. A token of the prompt's end and the answer's
        start (':"' with the Alpaca prompt) could be neither learned nor generated."""
        ids, offsets = [], []
        for first, last in pairwise([0, *cuts, len(text)]):
            [(piece_ids, piece_offsets)] = self._tokenize([text[first:last]], literal)
            if first:
                # Tokenizers made from sentencepiece put a space before any text: a line break
                # takes it, unless one token holds the break and more.
                [(broken_ids, broken)] = self._tokenize(["\n" + text[first:last]], literal)
                if not _inside_token(broken, 1):
                    kept = broken[:, 0] >= 1
                    piece_ids, piece_offsets = broken_ids[kept], broken[kept] - 1
            ids.append(piece_ids)
            offsets.append(piece_offsets + first)
        return np.concatenate(ids), np.concatenate(offsets)


def _bare(backend: Any) -> Any:
    """The tokenizer without a post-processor: special tokens are added in this module, and some
    post-processors strip spaces from the offsets, which would hide their speaker."""
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
