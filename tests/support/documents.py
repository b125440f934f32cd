"""Conversations, their documents, and what of a document is learned, in text."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from neftune_dist.config import DataConfig
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.tokenize import ConversationTokenizer, Document

ASK = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


def conversation(*turns: str, system: str = "") -> Conversation:
    """Turns of user and assistant by turns."""
    roles = ["user", "assistant"] * len(turns)
    pairs = tuple(Turn(*pair) for pair in zip(roles, turns, strict=False))
    return Conversation((Turn("system", system), *pairs) if system else pairs)


def with_template(tokenizer: Any, chat_template: str) -> Any:
    other = copy.deepcopy(tokenizer)
    other.chat_template = chat_template
    return other


def make(tokenizer: Any, **data: Any) -> ConversationTokenizer:
    return ConversationTokenizer(tokenizer, DataConfig(**data))


def document(template: ConversationTokenizer, spoken: Conversation) -> Document:
    return template.encode([template.render(spoken)])[0]


def decode(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))


def learned(tokenizer: Any, made: Document) -> list[str]:
    """The text of each run of learned tokens: what it adds to the decoded text in front of it, so
    that a decoder which drops the first space of a text drops none of it."""
    edges = np.flatnonzero(np.diff(made.supervised.astype(np.int8), prepend=0, append=0))
    texts = []
    for start, stop in edges.reshape(-1, 2):
        before, through = (decode(tokenizer, made.input_ids[:n]) for n in (start, stop))
        assert through.startswith(before)
        texts.append(through[len(before) :])
    return texts
