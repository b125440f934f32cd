"""Chat templates in Jinja, the model's or from a file: programs that render messages as text."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable
from contextlib import AbstractContextManager
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateSyntaxError

from neftune_dist.config import UserError, read_text
from neftune_dist.config.limits import limited
from neftune_dist.data import prompt_templates
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow

# Some templates write today's date, and the tokens would depend on the day (law 4). They get the
# one that Llama 3's own template falls back on.
_DATE = datetime(2024, 7, 26)
# Names of the field for reasoning, in the order in which they are tried.
_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking", "thought")
# The variable with which templates turn reasoning on and off.
_SWITCH = "enable_thinking"
# At the end of the generation prompt of some reasoning models.
OPENED_THOUGHT = re.compile(r"<think>\s*\Z")
# Written in place of the tags of a thought that a template would take out, and replaced afterwards.
_OPEN, _CLOSE = "Zq8vKopenWj", "Zq8vKcloseWj"

# Limits for one conversation: a template is a program that came with a model.
_SECONDS, _GIB, _CHARACTERS = 10.0, 1.0, 2**24
_SHOWN_CHARACTERS = 500  # of an error's text

Message = dict[str, Any]
Tools = list[Any] | None

# What a template is probed with.
_SAID, _ASKED = "Words that reach the text.", {"role": "user", "content": "A question."}


class ChatTemplate:
    """One Jinja template, with the tokenizer whose special tokens it writes.

    Attributes:
        given: the template as it was written.
        source: the template as it is run, with a fixed date.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.given = source
        self.source = _with_date(source) if "strftime_now" in source else source
        self._tokenizer = tokenizer

    @cached_property
    def reasoning_field(self) -> str | None:
        """The field of a message from which the template writes reasoning. "" where the generation
        prompt opens a thought, which the template takes out of the answers (R1's); None where
        reasoning has no place but the content."""
        usual = self._reasoning_of_answers
        # Gemma 4's first template writes it before calls alone.
        return self._field_of({"content": "", "tool_calls": [_call()]}) if usual is None else usual

    @cached_property
    def _reasoning_of_answers(self) -> str | None:
        """As `reasoning_field`, of answers that call nothing."""
        if (field := self._field_of({"content": "An answer."})) is not None:
            return field
        answer = {"role": "assistant", "content": f"<think>\n{_SAID}\n</think>\n\nAn answer."}
        try:
            opens = OPENED_THOUGHT.search(self.prompts([_ASKED], None)[-1])
            return "" if opens and _SAID not in self.apply([_ASKED, answer]) else None
        except BadRow:
            return None

    def _field_of(self, more: Message) -> str | None:
        for field in _REASONING_FIELDS:
            if self._writes(_SAID, [_ASKED, {"role": "assistant", **more, field: _SAID}]):
                return field
        return None

    @cached_property
    def _takes_parts(self) -> bool:
        """Whether contents must be lists of parts: those of some models of pictures and text."""
        part = {"type": "text", "text": _SAID}
        ways = [[{"role": "user", "content": content}] for content in (_SAID, [part])]
        # One that cuts texts may write the list itself.
        return self._takes_second(ways) and not self._writes(str(part), ways[1])

    @cached_property
    def _takes_text_arguments(self) -> bool:
        """Whether the arguments of a call must be JSON text (DeepSeek's), not an object."""
        calls = [_call({"word": _SAID})], [_call(json.dumps({"word": _SAID}))]
        answers = ({"role": "assistant", "content": "", "tool_calls": listed} for listed in calls)
        return self._takes_second([_ASKED, answer] for answer in answers)

    def _takes_second(self, ways: Iterable[list[Message]]) -> bool:
        """Whether the template writes the second of two ways to say the same, and not the first."""
        return [self._writes(_SAID, messages) for messages in ways] == [False, True]

    def expresses_system(self) -> bool:
        """Whether the text contains a system prompt before a question."""
        turns = (Turn("system", _SAID), Turn("user", "A question."))
        return self._writes(_SAID, self.messages(Conversation(turns)))

    def _writes(self, said: str, messages: list[Message]) -> bool:
        """Whether the template takes the messages, and its text contains what is said."""
        try:
            return said in self.apply(messages)
        except BadRow:
            return False

    def normalised(self, conversation: Conversation) -> Conversation:
        """The conversation as the template takes it: an Alpaca row's context in its question, and
        reasoning apart from the content where the template writes it from a field.

        Raises:
            BadRow: the row stores reasoning apart, and the template has no place for it.
        """
        turns = conversation.turns
        has_thoughts = any(turn.reasoning or "</think>" in turn.content for turn in turns)
        if not has_thoughts and not conversation.context:
            return conversation
        contents = [str(message["content"]) for message in conversation.messages()]
        made = []
        for number, (turn, content) in enumerate(zip(turns, contents, strict=True), 1):
            reasoning = turn.reasoning
            if turn.role == "assistant" and (reasoning or "</think>" in content):
                if reasoning and self.reasoning_field is None:
                    raise BadRow(
                        f"turn {number} has reasoning, and the chat template writes none from a "
                        "field: put it into the content, as <think>...</think>, or take a template "
                        f"that writes one of {', '.join(_REASONING_FIELDS)}"
                    )
                if self._reasoning_of_answers is not None:
                    if not reasoning:
                        reasoning, content = split_reasoning(content)
                    if "</think>" in content:
                        raise BadRow(
                            f"turn {number} has several thoughts, or '</think>' inside the "
                            "answer: the chat template writes one thought, before the answer"
                        )
            made.append(turn._replace(content=content, reasoning=reasoning))
        return Conversation(tuple(made), tools=conversation.tools)

    def messages(self, conversation: Conversation) -> list[Message]:
        """The messages of a normalised conversation, with reasoning where the template takes it."""
        messages = conversation.messages()
        for turn, message in zip(conversation.turns, messages, strict=True):
            if turn.reasoning and self.reasoning_field:
                message[self.reasoning_field] = turn.reasoning
            elif turn.reasoning and message is messages[-1]:
                message["content"] = f"{_OPEN}\n{turn.reasoning}\n{_CLOSE}\n\n{turn.content}"
            if turn.tool_calls and self._takes_text_arguments:
                for call in message["tool_calls"]:
                    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
                    call["function"]["arguments"] = arguments
            if self._takes_parts:
                message["content"] = [{"type": "text", "text": message["content"]}]
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
                    raise UserError(
                        f"The chat template makes more than {_CHARACTERS:,} characters of one "
                        "conversation."
                    )
        except UserError:
            raise
        except TemplateSyntaxError as error:
            raise UserError(
                f"The chat template is no valid Jinja: line {error.lineno}: "
                f"{str(error.message).rstrip('.')}."
            ) from error
        except Exception as error:  # a template is a program, and can fail in any way
            said = str(error)  # which a template can make of any length
            if len(said) > _SHOWN_CHARACTERS:
                said = f"{said[:_SHOWN_CHARACTERS]}..."
            raise BadRow(f"the chat template refuses the turns: {said}") from error
        return text.replace(_OPEN, "<think>").replace(_CLOSE, "</think>")

    def prompts(self, messages: list[Message], tools: Tools) -> list[str]:
        """The prompts for an answer to the messages, the longest first. Reasoning models have
        several: one may hold the empty reasoning of an answer without reasoning."""
        prompts = {self.apply(messages, tools, add_generation_prompt=True)}
        for value in (False, True) if _SWITCH in self.source else ():
            switches = {"add_generation_prompt": True, _SWITCH: value}
            prompts.add(self.apply(messages, tools, **switches))
        return sorted(prompts, key=len, reverse=True)


def bounded() -> AbstractContextManager[None]:
    """Limit the time and memory of a template for one conversation. Raises `UserError`, as it is an
    error of the template, not of the row: the next row would take as long."""
    return limited(_SECONDS, _GIB, UserError, "The chat template, for one conversation,")


def with_system(source: str, said: str) -> str:
    """The template, with a default system prompt for conversations without one."""
    turn = f"{{'role': 'system', 'content': {prompt_templates.quoted(said)}}}"
    # The "+" keeps the template's first white space.
    return (
        "{%- if messages[0]['role'] != 'system' %}"
        f"{{%- set messages = [{turn}] + messages %}}{{%- endif +%}}{source}"
    )


def read_template(tokenizer: Any, template: str, name: str) -> str:
    """The tokenizer's own template for `data.template=chat`, else that of the file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if template != "chat":
        with bounded():
            return read_text(template, "data.template")
    own: str | dict[str, str] | None = tokenizer.chat_template
    if isinstance(own, dict) and own:
        return by_name(own, name)
    if not own:
        raise UserError(
            f"The tokenizer {name} has no chat template: set data.template=alpaca, vicuna, llama2 "
            "or the path of a .jinja file, or use a model that has one."
        )
    return str(own)


def by_name(templates: dict[str, str], name: str) -> str:
    """Templates of a tokenizer under names as one, which chooses by the row as transformers does.

    Raises:
        UserError: it would choose none of them.
    """
    names = ", ".join(sorted(templates))
    if not {"default", "tool_use"} & templates.keys():
        raise UserError(
            f"The chat templates of the tokenizer {name} are {names}, none of them named default: "
            "write the one to use into a .jinja file, and set data.template to that."
        )
    missing = prompt_templates.quoted(
        f"the tokenizer's templates are {names}: none is the default, for rows without tools"
    )
    usual = templates.get("default", f"{{{{ raise_exception({missing}) }}}}")
    if "tool_use" not in templates:
        return usual
    # Jinja drops the last line break of a template, and "+" keeps all other white space.
    with_tools = templates["tool_use"].removesuffix("\n")
    return (
        f"{{%- if tools +%}}{with_tools}{{%+ else +%}}{usual.removesuffix(chr(10))}{{%+ endif %}}"
    )


def _with_date(source: str) -> str:
    """The template, with a fixed date for every format code."""
    codes = (f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters)
    filters = "".join(
        f"|replace({prompt_templates.quoted(code)}, {prompt_templates.quoted(text)})"
        for code in codes
        if (text := _DATE.strftime(code)) != code
    )
    # The "+" keeps the template's first white space.
    percent = "|replace('%%', '\0')", "|replace('\0', '%')"
    return (
        "{%- macro strftime_now(format) %}{{ format"
        f"{percent[0]}{filters}{percent[1]} }}}}{{% endmacro +%}}{source}"
    )


def split_reasoning(content: str) -> tuple[str, str]:
    """The reasoning at the head of a content, and the rest; "" where there is none. R1's answers
    begin inside it: the prompt opens it. A mention of the tag has a space after it."""
    head, _, rest = content.partition("</think>")
    head = head.strip()
    is_closed = head.startswith("<think>") or not rest.startswith(" ")
    head = head.removeprefix("<think>")
    if "</think>" not in content or "<think>" in head + rest or "</think>" in rest or not is_closed:
        return "", content
    return head.strip("\n"), rest.lstrip("\n")


def _call(arguments: Any = None) -> dict[str, Any]:
    """A call for a probe."""
    function = {"name": "look_up", "arguments": arguments or {"word": "tree"}}
    return {"type": "function", "function": function}
