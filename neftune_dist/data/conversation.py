"""Conversations: what every row becomes, whatever its format."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from neftune_dist.data.errors import BadRow

ROLES = ("system", "user", "assistant", "tool")
# The head of an answer at the end of a question: the prompt is in a template already.
_HEAD = re.compile(
    r"(### ?(response|answer|assistant|output):?|\[/INST\]|<\|im_start\|>assistant|<\|assistant\|>"
    r"|<\|start_header_id\|>assistant<\|end_header_id\|>|<start_of_turn>model|<\|start\|>assistant"
    r"|\n(assistant|gpt|ai):)\s*$",
    re.I,
)
# The end of a turn, as the templates of many models write it.
_ENDS = (
    r"</s>|<eos>|<end_of_turn>|<turn\|>|<\uff5cend▁of▁sentence\uff5c>"
    r"|<\|(?:im_end|endoftext|end_of_text|eot_id|eot|end|end_of_turn|return)\|>"
)


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: one of `ROLES`.
        content: the text.
        tool_calls: an assistant's calls beside its content, or in its place: "" or a JSON list in
            OpenAI's form, `{"type": "function", "function": {"name": ..., "arguments": {...}}}`.
        tool_call_id, name: of a tool's turn: the call that it answers, and the function.
        reasoning: an assistant's thoughts before the content, stored apart from it.
        learned: whether an assistant's turn is supervised; False where the row says so.
    """

    role: str
    content: str
    tool_calls: str = ""
    tool_call_id: str = ""
    name: str = ""
    reasoning: str = ""
    learned: bool = True


@dataclass(frozen=True)
class Conversation:
    """Turns with at least one answer; or a plain text without turns.

    Attributes:
        turns: in their order.
        context: the `input` of an Alpaca row, separate from the instruction in the Alpaca prompt.
        tools: the functions that the assistant may call: "" or a JSON list in OpenAI's form,
            `{"type": "function", "function": {"name": ..., "parameters": ...}}`.
        text: a document without turns, supervised whole, without a template.
        num_left_out: turns of the row that are dropped: answers that nothing asks for, questions
            that nothing answers.
    """

    turns: tuple[Turn, ...]
    context: str = ""
    tools: str = ""
    text: str = ""
    num_left_out: int = 0

    @property
    def functions(self) -> list[Any] | None:
        """The functions of `tools`, as templates take them; None without any."""
        return json.loads(self.tools) if self.tools else None

    def messages(self) -> list[dict[str, Any]]:
        """The messages for a chat template; an Alpaca row's context follows its instruction. Keys
        beside `role` and `content` are present where they are not empty."""
        messages = []
        for turn in self.turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            calls = json.loads(turn.tool_calls) if turn.tool_calls else None
            more = {"tool_calls": calls, "tool_call_id": turn.tool_call_id, "name": turn.name}
            messages.append(message | {key: value for key, value in more.items() if value})
        if self.context:
            asked = next(message for message in messages if message["role"] == "user")
            asked["content"] += "\n\n" + self.context
        return messages

    def opening(self) -> list[dict[str, Any]]:
        """The messages before the first answer; none for a plain text."""
        roles = [turn.role for turn in self.turns]
        return self.messages()[: roles.index("assistant")] if roles else []

    def refuse_templated(self, text: str, eos: str) -> None:
        """Raise `BadRow` where a question ends with the head of its answer, or a turn with its end,
        and the template writes another behind it.

        Args:
            text: the conversation in the template.
            eos: the tokenizer's end-of-sequence token.
        """
        ends = f"({_ENDS}|{re.escape(eos)})" if eos else f"({_ENDS})"
        for number, turn in enumerate(self.turns, 1):
            end = re.search(rf"{ends}\s*\Z", turn.content[-60:])
            if not end or (end[1] == "</s>" and "<s>" in turn.content):  # HTML's
                continue
            tail = re.escape(turn.content[-200:].rstrip())
            if another := re.search(rf"{tail}\s*{ends}", text):
                raise BadRow(
                    f"turn {number} ends with {end[1]!a}, and the template writes {another[1]!a} "
                    "behind it: give it without, or by data.template a .jinja file that adds "
                    "nothing to it"
                )
        for asked, said in pairwise(self.turns):
            head = _HEAD.search(asked.content[-60:]) if asked.role == "user" else None
            if head and asked.content + said.content not in text:
                raise BadRow(
                    f"a question ends with {head[1].strip()!a}, so it is in a template already: "
                    "give it without, or by data.template a .jinja file that adds nothing to it"
                )
