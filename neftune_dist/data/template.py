"""Conversations to text, and from text to tokens with the mask of what is learned.

Owns the chat template's use, the Alpaca prompt, and law 3's mask: which tokens are supervised is
decided by character spans of the rendered text, never by token ids, so that an end-of-turn token is
learned even where it equals the padding token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

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


@dataclass(frozen=True)
class Rendered:
    """A conversation's text and the half-open character spans that are learned.

    marks_end: whether the last answer's span goes beyond its content, to an end-of-turn token.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    marks_end: bool


@dataclass(frozen=True)
class Document:
    """input_ids: tokens. supervised: 1 where the token is learned (never the first one).

    end_learned: whether the token that ends the last answer is there and learned.
    """

    input_ids: list[int]
    supervised: list[int]
    end_learned: bool


class Template:
    """Renders and tokenises conversations as `data.template` and `data.supervise` say."""

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The tokenizer {type(tokenizer).__name__} gives no character offsets, which the "
                "loss mask needs: use a model with a tokenizer.json."
            )
        if config.template == "chat" and not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template: set "
                "data.template=alpaca, or use a model that has one."
            )
        if config.template == "alpaca" and tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer of {tokenizer.name_or_path} has no end-of-sequence token, with "
                "which the Alpaca prompt's answers end."
            )

    def prompt(self, conversation: Conversation) -> str:
        """The text in front of the first answer, as generation is given it."""
        if self.config.template == "alpaca":
            return _alpaca_prompt(conversation)
        first = next(i for i, (role, _) in enumerate(conversation.turns) if role == "assistant")
        return self._apply(conversation.messages()[:first], add_generation_prompt=True)

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The tokens of `prompt`."""
        ids: list[int] = self.tokenizer(
            self.prompt(conversation), add_special_tokens=self.config.template == "alpaca"
        )["input_ids"]
        return ids

    def render(self, conversation: Conversation) -> Rendered:
        """Text and learned spans. Raises `BadRow` where the template cannot express the turns."""
        if self.config.template == "alpaca":
            prompt, answer = _alpaca_prompt(conversation), conversation.turns[-1][1]
            span = (len(prompt), len(prompt) + len(answer))
            return Rendered(prompt + answer, (span,), marks_end=True)
        messages = conversation.messages()
        text = self._apply(messages)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._apply(messages[:i], add_generation_prompt=True)
            through = text if i == len(messages) - 1 else self._apply(messages[: i + 1])
            if not (text.startswith(through) and through.startswith(before)):
                raise BadRow(
                    f"the chat template renders turn {i + 1} differently once later turns follow, "
                    "so what the assistant said in it cannot be told apart"
                )
            content_end, turn_end = _ends(through, len(before), message["content"])
            spans.append((len(before), turn_end))
        return Rendered(text, tuple(spans), marks_end=turn_end > content_end)

    def encode(self, rendered: Sequence[Rendered]) -> list[Document]:
        """Tokens and masks, in one call of the tokenizer."""
        alpaca = self.config.template == "alpaca"
        encoded = self.tokenizer(
            [r.text for r in rendered],
            # A chat template writes its own special tokens.
            add_special_tokens=alpaca,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # the length is this package's own business
        )
        documents = []
        for r, ids, offsets in zip(
            rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            supervised = [
                int(any(begin <= start < end for begin, end in r.spans)) if stop > start else 0
                for start, stop in offsets
            ]
            if alpaca:
                if not ids or ids[-1] != self.tokenizer.eos_token_id:
                    ids, supervised = [*ids, self.tokenizer.eos_token_id], [*supervised, 1]
                else:
                    supervised[-1] = 1
            if self.config.supervise == "all":
                supervised = [1] * len(ids)
            if supervised:
                supervised[0] = 0  # nothing comes before it that could predict it
            documents.append(Document(ids, supervised, r.marks_end))
        return documents

    def _apply(self, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise BadRow(f"the chat template refuses the turns: {error}") from error
        return text


def _alpaca_prompt(conversation: Conversation) -> str:
    roles = [role for role, _ in conversation.turns]
    if roles != ["user", "assistant"]:
        raise BadRow(
            f"the Alpaca prompt takes one instruction and one answer, not the turns {roles}"
        )
    instruction = conversation.turns[0][1]
    if conversation.context:
        return _ALPACA_WITH_INPUT.format_map(
            {"instruction": instruction, "input": conversation.context}
        )
    return _ALPACA_WITHOUT_INPUT.format_map({"instruction": instruction})


def _ends(text: str, start: int, content: str) -> tuple[int, int]:
    """Where the assistant's content ends, and where its turn does: behind the end-of-turn token,
    before the template's own white space that leads to the next turn (no model generates that)."""
    inside = text.find(content, start)
    if inside < 0:  # a template that trims contents
        content = content.strip()
        inside = text.find(content, start)
    if inside < 0:
        raise BadRow("the chat template changes the assistant's text")
    end = inside + len(content)
    return end, end + len(text[end:].rstrip())
