"""Chat templates in Jinja, the model's or from a file: programs that render messages as text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from neftune_dist.config import UserError
from neftune_dist.config.limits import limited
from neftune_dist.data import prompt_templates
from neftune_dist.data.conversation import Conversation
from neftune_dist.data.errors import BadRow

# Some templates write today's date, and the tokens would depend on the day (law 4). They get the
# date that Llama 3's own template falls back on. The "+" keeps the template's first white space.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format|replace('%d', '26')|replace('%m', '07')"
    "|replace('%b', 'Jul')|replace('%B', 'July')|replace('%y', '24')|replace('%Y', '2024') }}"
    "{% endmacro +%}"
)
# Names of the field for reasoning, in the order in which they are tried.
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

# Limits for one conversation: a template is a program that came with a model.
_SECONDS, _GIB, _CHARACTERS = 10.0, 1.0, 2**24
_SHOWN_CHARACTERS = 500  # of an error's text

Message = dict[str, Any]
Tools = list[Any] | None


class ChatTemplate:
    """One Jinja template, with the tokenizer whose special tokens it writes.

    Attributes:
        given: the template as it was written.
        source: the template as it is run, with a fixed date.
        special: the texts of the special tokens.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.given = source
        self.source = _FIXED_DATE + source if "strftime_now" in source else source
        self.special = tuple(
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        )
        self._tokenizer = tokenizer

    @cached_property
    def reasoning_field(self) -> str | None:
        """The field of a message from which the template writes reasoning; None without one."""
        asked, said = {"role": "user", "content": "A question."}, "Reasoning that reaches the text."
        for field in _REASONING_FIELDS:
            answer = {"role": "assistant", "content": "An answer.", field: said}
            try:
                if said in self.apply([asked, answer]):
                    return field
            except BadRow:
                continue
        return None

    def messages(self, conversation: Conversation) -> list[Message]:
        """The messages of a conversation, with reasoning under the template's own field: also
        reasoning that the row has in the content, which such a template would write elsewhere.

        Raises:
            BadRow: the template has no field for reasoning that the row stores apart.
        """
        messages = conversation.messages()
        for number, (turn, message) in enumerate(zip(conversation.turns, messages, strict=True), 1):
            reasoning = turn.reasoning
            if turn.role != "assistant" or not (reasoning or "</think>" in turn.content):
                continue
            if (field := self.reasoning_field) is None:
                if not reasoning:
                    continue
                raise BadRow(
                    f"turn {number} has reasoning, and the chat template writes none from a field: "
                    "put it into the content, as <think>...</think>, or take a template that "
                    f"writes one of {', '.join(_REASONING_FIELDS)}"
                )
            if not reasoning:
                reasoning, message["content"] = split_reasoning(turn.content)
            if reasoning:
                message[field] = reasoning
        return messages

    def apply(self, messages: list[Message], tools: Tools = None, **switches: bool) -> str:
        """Render messages as text.

        Args:
            messages: as `Conversation.messages` makes them.
            tools: schemas of the functions that the assistant may call.
            switches: further variables of the template.

        Raises:
            BadRow: the template fails.
            UserError: it exceeds a limit.
        """
        try:
            with bounded():
                text: str = self._tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=self.source, tokenize=False, **switches
                )
                if len(text) > _CHARACTERS:
                    raise MemoryError
        except UserError:
            raise
        except Exception as error:  # a template is a program, and can fail in any way
            raise BadRow(f"the chat template refuses the turns: {_shortened(error)}") from error
        return text

    def prompts(self, messages: list[Message], tools: Tools) -> list[str]:
        """The prompts for an answer to the messages, the longest first. Reasoning models have a
        second one, which holds the empty reasoning of an answer without reasoning."""
        prompts = {self.apply(messages, tools, add_generation_prompt=True)}
        if "enable_thinking" in self.source:
            switches = {"add_generation_prompt": True, "enable_thinking": False}
            prompts.add(self.apply(messages, tools, **switches))
        return sorted(prompts, key=len, reverse=True)

    def prompt(self, conversation: Conversation) -> str:
        """The prompt for the first answer, with an empty reasoning if the answer has none."""
        messages, tools = self.messages(conversation), tools_of(conversation)
        first = len(conversation.opening())
        prompts = self.prompts(messages[:first], tools)
        through = self.apply(messages[: first + 1], tools)
        return next((prompt for prompt in prompts if through.startswith(prompt)), prompts[-1])

    def generations(self, messages: list[Message], tools: Tools) -> list[tuple[int, int]]:
        """Half-open character ranges that the template marks as generated; none without marks."""
        if not _GENERATION.search(self.source):
            return []
        with bounded():
            _, [marks] = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        return list(marks)

    def expresses_system(self) -> bool:
        """Whether the text contains a system prompt before a question."""
        said = "A system prompt that must reach the text."
        try:
            text = self.apply(
                [{"role": "system", "content": said}, {"role": "user", "content": "A question."}]
            )
        except BadRow:
            return False
        return said in text


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the time and memory of a template for one conversation. Raises `UserError` where the
    template exceeds them."""
    try:
        with limited(_SECONDS, _GIB):
            yield
    except (TimeoutError, MemoryError) as error:
        # An error of the template, not of the row: the next row would take as long.
        raise UserError(
            f"The chat template takes more than {_SECONDS:g} s, {_GIB:g} GiB of memory or "
            f"{_CHARACTERS:,} characters for one conversation: it is not used."
        ) from error


def _shortened(error: Exception) -> str:
    """The message of an error, which a template can make of any length."""
    text = str(error)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def with_system(source: str, said: str) -> str:
    """The template, with a default system prompt for conversations without one."""
    turn = f"{{'role': 'system', 'content': {prompt_templates.quoted(said)}}}"
    # The "+" keeps the template's first white space.
    return (
        "{%- if messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{turn}] + messages %}}{{%- endif +%}}{source}"
    )


def split_reasoning(content: str) -> tuple[str, str]:
    """The reasoning at the head of a content, and the rest; "" where there is none. R1's answers
    begin inside it: the prompt opens it."""
    head, _, rest = content.partition("</think>")
    head = head.strip().removeprefix("<think>")
    if "</think>" not in content or "<think>" in head + rest or "</think>" in rest:
        return "", content
    return head.strip("\n"), rest.lstrip("\n")


def tools_of(conversation: Conversation) -> Tools:
    """The schemas of the functions that the assistant may call, for a template."""
    return json.loads(conversation.tools) if conversation.tools else None
