"""Conversations to text, and from text to tokens with the mask of what is learned.

Owns the chat template's use, the Alpaca prompt, and law 3's mask: which tokens are supervised is
decided by character spans of the rendered text, never by token ids, so that an end-of-turn token is
learned even where it equals the padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data.formats import BadRow, Conversation

# The prompt of Stanford Alpaca, which the NEFTune paper's Alpaca runs use (appendix A).
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
# Some templates write today's date, which would make the tokens depend on the day they were made
# (law 4). They get the date that Llama 3's own template falls back on. The "+" keeps the template's
# first white space.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format|replace('%d', '26')|replace('%m', '07')"
    "|replace('%b', 'Jul')|replace('%B', 'July')|replace('%y', '24')|replace('%Y', '2024') }}"
    "{% endmacro +%}"
)


@dataclass(frozen=True)
class Rendered:
    """A conversation's text and the half-open character spans that are learned.

    marks_end: whether the last answer's span goes beyond its content, to an end-of-turn token.
    framed: the tokenizer's beginning goes in front of it, its end-of-sequence token, learned,
        behind it; a chat template writes both itself.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    marks_end: bool
    framed: bool = False


@dataclass(frozen=True, eq=False)
class Document:
    """One document, not yet cut to length.

    input_ids: int32 (length,). supervised: uint8 (length,), 1 where the token is learned (never the
    first one). end_learned: whether the token that ends the last answer is there and learned.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    end_learned: bool


class Template:
    """Renders and tokenises conversations as `data.template` and `data.supervise` say."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {name} gives no character offsets, which the loss mask needs: use "
                "a model with a tokenizer.json."
            )
        # Without a post-processor: special tokens are put in here, and some post-processors take
        # spaces off the offsets, which would hide who said them.
        backend = tokenizer.backend_tokenizer
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.post_processor = None
        self._backend.no_truncation()
        self._backend.no_padding()
        # What the tokenizer puts in front of a text. A chat template writes its own.
        probe = tokenizer("a", return_special_tokens_mask=True)
        num_special = probe["special_tokens_mask"].index(0)
        self._prefix = np.array(probe["input_ids"][:num_special], np.int32)
        self._chat_template = ""
        if config.template == "alpaca":
            if tokenizer.eos_token_id is None:
                raise UserError(
                    f"The tokenizer {name} has no end-of-sequence token, with which the Alpaca "
                    "prompt's answers end."
                )
            return
        try:
            self._chat_template = tokenizer.get_chat_template()
        except ValueError as error:
            raise UserError(
                f"The tokenizer {name} has no chat template: set data.template=alpaca, or use a "
                "model that has one."
            ) from error
        if "strftime_now" in self._chat_template:
            self._chat_template = _FIXED_DATE + self._chat_template

    def identity(self) -> dict[str, Any]:
        """All of the tokenizer that decides what a conversation becomes, as plain values."""
        return {
            "backend": self._backend.to_str(),
            "prefix": self._prefix.tolist(),
            "chat_template": self._chat_template,
            "special_tokens": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
        }

    def prompt(self, conversation: Conversation) -> str:
        """The text in front of the first answer, as generation is given it."""
        if self.config.template == "alpaca":
            return _alpaca_prompt(conversation)
        return self._apply(conversation.opening(), add_generation_prompt=True)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The tokens of `prompt`."""
        [(ids, _)] = self._tokenize([self.prompt(conversation)])
        prefix = self._prefix.tolist() if self.config.template == "alpaca" else []
        return [*prefix, *ids.tolist()]

    def render(self, conversation: Conversation) -> Rendered:
        """Text and learned spans. Raises `BadRow` where the template cannot express the turns."""
        if conversation.text:
            if self.tokenizer.eos_token_id is None:
                raise BadRow("the tokenizer has no end-of-sequence token, with which a text ends")
            span = (0, len(conversation.text))
            return Rendered(conversation.text, (span,), marks_end=True, framed=True)
        if self.config.template == "alpaca":
            prompt, answer = _alpaca_prompt(conversation), conversation.turns[-1].content
            span = (len(prompt), len(prompt) + len(answer))
            return Rendered(prompt + answer, (span,), marks_end=True, framed=True)
        messages = conversation.messages()
        text = self._apply(messages)
        spans = []
        marks_end = False
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:i], add_generation_prompt=True)
            through = text if i == len(messages) - 1 else self._apply(messages[: i + 1])
            if not text.startswith(through):
                raise BadRow(
                    f"the chat template renders turn {i + 1} differently once later turns follow, "
                    "so what the assistant said in it cannot be told apart"
                )
            if not through.startswith(before):
                raise BadRow(
                    f"the chat template's generation prompt is not what turn {i + 1} begins with, "
                    "so what the assistant said in it cannot be told apart"
                )
            end, marks_end = _turn_end(through, len(before), message["content"])
            spans.append((len(before), end))
        return Rendered(text, tuple(spans), marks_end)

    def encode(self, rendered: Sequence[Rendered]) -> list[Document]:
        """Tokens and masks, in one call of the tokenizer."""
        documents = []
        encoded = self._tokenize([r.text for r in rendered])
        for r, (ids, offsets) in zip(rendered, encoded, strict=True):
            cuts = [begin for begin, _ in r.spans if _inside_token(offsets, begin)]
            if cuts:
                ids, offsets = self._tokenize_in_pieces(r.text, cuts)
            supervised = _learned(offsets, r.spans)
            if r.framed:
                ids = np.concatenate([self._prefix, ids])
                supervised = np.concatenate([np.zeros(len(self._prefix), np.uint8), supervised])
                if ids[-1] != self.tokenizer.eos_token_id:
                    ids = np.append(ids, np.int32(self.tokenizer.eos_token_id))
                    supervised = np.append(supervised, np.uint8(1))
            if self.config.supervise == "all":
                supervised = np.ones_like(supervised)
            supervised[:1] = 0  # nothing comes before it that could predict it
            documents.append(Document(ids, supervised, r.marks_end))
        return documents

    def _tokenize(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text, without special tokens around it: input_ids int32 (length,) and half-open
        character offsets int64 (length, 2)."""
        return [
            (np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2))
            for e in self._backend.encode_batch(texts, add_special_tokens=False)
        ]

    def _tokenize_in_pieces(self, text: str, cuts: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """As `_tokenize`, with no token across a cut. A token that holds the prompt's end and the
        answer's beginning (':"' with the Alpaca prompt) could be neither learned nor generated."""
        ids, offsets = [], []
        for first, last in pairwise([0, *cuts, len(text)]):
            [(piece_ids, piece_offsets)] = self._tokenize([text[first:last]])
            if first:
                # Tokenizers made from sentencepiece put a space in front of whatever they are
                # given: a line break takes it, unless one token holds the break and more.
                [(broken_ids, broken_offsets)] = self._tokenize(["\n" + text[first:last]])
                if not _inside_token(broken_offsets, 1):
                    kept = broken_offsets[:, 0] >= 1
                    piece_ids, piece_offsets = broken_ids[kept], broken_offsets[kept] - 1
            ids.append(piece_ids)
            offsets.append(piece_offsets + first)
        return np.concatenate(ids), np.concatenate(offsets)

    def _apply(self, messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # a template is a program, and can fail in any way
            raise BadRow(f"the chat template refuses the turns: {error}") from error
        return text


def _alpaca_prompt(conversation: Conversation) -> str:
    roles = [turn.role for turn in conversation.turns]
    if roles != ["user", "assistant"]:
        raise BadRow(
            "the Alpaca prompt takes one instruction and one answer, not the turns "
            f"{', '.join(roles[:4])}{', ...' if len(roles) > 4 else ''}"
        )
    instruction = conversation.turns[0].content
    if conversation.context:
        return _ALPACA_WITH_INPUT.format_map(
            {"instruction": instruction, "input": conversation.context}
        )
    return _ALPACA_WITHOUT_INPUT.format_map({"instruction": instruction})


def _turn_end(text: str, start: int, content: str) -> tuple[int, bool]:
    """Where the assistant's turn ends, and whether anything marks its end: behind the end-of-turn
    token, before the template's own white space that leads to the next turn (no model generates
    that)."""
    inside = text.find(content, start)
    if inside < 0:  # a template that trims contents
        content = content.strip()
        inside = text.find(content, start)
    if inside < 0:
        raise BadRow("the chat template changes the assistant's text")
    content_end = inside + len(content)
    tail = text[content_end:].rstrip()
    return content_end + len(tail), bool(tail)


def _inside_token(offsets: np.ndarray, place: int) -> bool:
    """Whether one token holds characters on both sides of a place in the text."""
    return bool(np.any((offsets[:, 0] < place) & (place < offsets[:, 1])))


def _learned(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """uint8 (length,): 1 for the tokens that begin within a span."""
    starts = offsets[:, 0]
    learned = np.zeros(len(offsets), np.uint8)
    for begin, end in spans:
        learned[(begin <= starts) & (starts < end)] = 1
    return learned
