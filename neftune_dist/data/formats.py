"""Formats of rows, recognised by their fields and converted to conversations.

    alpaca             instruction, input?, output; system?   (Evol-Instruct, Platypus too)
    dolly              instruction, context?, response
    sharegpt           conversations of from, value (or role, content); system?, tools?
    messages           messages of role, content, tool_calls; tools?   (OpenAI's)
    prompt_completion  prompt, completion: texts, or lists of messages (TRL's)
    text               text: learned whole, without a template

A field that would be learned wrongly, or silently ignored, makes the row a `BadRow` with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any

from neftune_dist.data import fields
from neftune_dist.data.conversation import ROLES, Conversation, Turn
from neftune_dist.data.errors import BadRow, type_name

# Names of roles in ShareGPT files. A function call is the assistant's.
_ALIASES = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant"),
    "observation": "tool",
}
_OPENAI_ROLES = {**{role: role for role in ROLES}, "developer": "system"}
# Fields of a turn whose content would not be learned, or learned as something else.
_REFUSED_FIELDS = ("function_call", "reasoning_content", "thinking", "audio", "refusal")
# About the characters of a document of 2^20 tokens, the largest `data.max_length`.
_MOST_CHARACTERS = 4 * 2**20


def detect_format(row: Mapping[str, Any]) -> str:
    """The format whose fields the row has. Raises `BadRow` where no format matches."""
    if name := _matching(row):
        return name
    found = ", ".join(ascii(key)[1:-1] for key in row) or "(none)"
    known = "; ".join(", ".join(needed) for needed, _ in _FORMATS.values())
    raise BadRow(f"the fields {shorten(found, 80)} are of no known format ({known})")


def _matching(row: Mapping[str, Any]) -> str:
    """The first format whose fields the row has, not null where possible; "" where none matches."""
    for names in ({name for name, value in row.items() if value is not None}, row.keys()):
        for name, (needed, _) in _FORMATS.items():
            if names >= set(needed):
                return name
    return ""


def to_conversation(row: Mapping[str, Any], format_name: str) -> Conversation:
    """Convert a row to a conversation with an answer, or a plain text.

    Trailing turns that nothing answers are left out in every format; in ShareGPT's also leading
    answers, because its files cut longer conversations anywhere. Both count in `num_left_out`.

    Raises:
        BadRow: names the field or the turn that is missing or wrong.
    """
    needed, convert = _FORMATS[format_name]
    for field in needed:
        if field not in row:
            other = _matching(row)
            hint = f": the row is of the format {other}" if other else ""
            raise BadRow(f"field '{field}' is missing{hint}")
    conversation = convert(row)
    length = len(conversation.text) + len(conversation.context)
    length += sum(len(turn.content) + len(turn.tool_calls) for turn in conversation.turns)
    if length > _MOST_CHARACTERS:
        raise BadRow(f"{length} characters are more than the {_MOST_CHARACTERS} of a document")
    return conversation


def _alpaca(row: Mapping[str, Any], context: str = "input", answer: str = "output") -> Conversation:
    if row.get("history"):
        raise BadRow("field 'history' holds turns: give all turns as 'messages'")
    asked, said = fields.text(row, "instruction"), fields.text(row, answer)
    given = fields.text(row, context) if row.get(context) is not None else ""
    if not asked.strip():
        asked, given = given, ""
    extra = (("task", row["task"]),) if isinstance(row.get("task"), str) else ()
    return replace(
        _exchange(row, "instruction", asked, said),
        context=given if given.strip() else "",
        extra=extra,
    )


def _exchange(row: Mapping[str, Any], field: str, asked: str, said: str) -> Conversation:
    if not asked.strip():
        raise BadRow(f"the {field} is empty")
    if not said.strip():
        raise BadRow("the answer is empty")
    return Conversation((*_system(row), Turn("user", asked), Turn("assistant", said)))


def _plain_text(row: Mapping[str, Any]) -> Conversation:
    text = fields.text(row, "text")
    if not text.strip():
        raise BadRow("the text is empty")
    return Conversation((), text=text)


def _prompt_completion(row: Mapping[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        asked, said = fields.text(row, "prompt"), fields.text(row, "completion")
        return _exchange(row, "prompt", asked, said)
    before, after = _turns(row, "prompt"), _turns(row, "completion")
    for number, turn in enumerate(before, 1):
        if turn.role == "assistant":
            raise BadRow(
                f"turn {number} of 'prompt' is an answer, which would be learned with the "
                "completion: give the turns as 'messages'"
            )
    if after[0].role != "assistant":
        raise BadRow(f"the completion begins with the role {after[0].role}, not assistant")
    return _answered((*before, *after), row)


def _messages(row: Mapping[str, Any]) -> Conversation:
    turns = _turns(row, "messages")
    if turns[0].role == "assistant":
        raise BadRow("the first turn is the assistant's, with nothing that it answers")
    return _answered(turns, row)


def _sharegpt(row: Mapping[str, Any]) -> Conversation:
    """Roles must take turns, a system turn first: where the same one speaks twice, turns were lost
    between, so the conversation is refused, as FastChat does."""
    turns = _turns(row, "conversations")
    head = 1 if turns[0].role == "system" else 0
    opened = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    if opened == len(turns):
        raise BadRow("no turn is the user's")
    if any(turn.role != "assistant" for turn in turns[head:opened]):
        raise BadRow(f"turn {head + 1} is the {turns[head].role}'s, before the user has spoken")
    previous = turns[opened]
    for number, turn in enumerate(turns[opened + 1 :], opened + 2):
        if turn.role not in _following(previous):
            raise BadRow(
                f"turn {number} is the {turn.role}'s and cannot follow one of the {previous.role}: "
                "a turn is missing, or out of order"
            )
        previous = turn
    made = _answered((*turns[:head], *turns[opened:]), row)
    return replace(made, num_left_out=made.num_left_out + opened - head)


def _following(turn: Turn) -> tuple[str, ...]:
    """The roles that may follow a turn."""
    if turn.role == "assistant":  # some write their calls into the content
        return ("tool",) if turn.tool_calls else ("user", "tool")
    return ("assistant", "tool") if turn.role == "tool" else ("assistant",)


def _answered(turns: Sequence[Turn], row: Mapping[str, Any]) -> Conversation:
    """The conversation up to the last answer, with the row's system prompt and tools."""
    if all(turn.role != "assistant" for turn in turns):
        raise BadRow("no turn is the assistant's")
    ends = max(i for i, turn in enumerate(turns) if turn.role == "assistant") + 1
    system = _system(row)
    if system and turns[0].role == "system":
        raise BadRow("the row has a field 'system' and a system turn as well")
    return Conversation(
        (*system, *turns[:ends]), tools=fields.tools(row), num_left_out=len(turns) - ends
    )


def _system(row: Mapping[str, Any]) -> tuple[Turn, ...]:
    if row.get("system") is None or row["system"] == "":
        return ()
    return (Turn("system", fields.text(row, "system")),)


def _turns(row: Mapping[str, Any], field: str) -> list[Turn]:
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"field '{field}' is not a list of turns but {type_name(messages)}")
    aliases = _ALIASES if field == "conversations" else _OPENAI_ROLES
    turns = []
    for number, message in enumerate(messages, 1):
        try:
            turns.append(_turn(message, aliases))
        except BadRow as error:
            raise BadRow(f"turn {number}: {error}") from None
    return turns


def _turn(message: Any, aliases: Mapping[str, str]) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(f"not an object with 'role' and 'content' but {type_name(message)}")
    by = "from" if "from" in message and aliases is _ALIASES else "role"
    called = fields.text(message, by)
    role = aliases.get(called.lower() if aliases is _ALIASES else called)
    if role is None:
        raise BadRow(f"the role {called[:40]!a} is not known; known: {', '.join(aliases)}")
    for field in _REFUSED_FIELDS:
        if message.get(field):
            raise BadRow(f"field '{field}' would not be learned: put what it says into the content")
    if role == "assistant" and message.get("weight") not in (None, 1):
        raise BadRow(f"field 'weight' is {message['weight']!a}: every answer is learned alike")
    if called.lower() == "function_call":
        return Turn(role, "", fields.calls([fields.parsed(message, "value")]))
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise BadRow(f"field 'tool_calls' in a turn of the {role}")
    content = _content(message, "value" if by == "from" else "content", bool(calls))
    if not content.strip() and not calls and role in ("user", "assistant"):
        raise BadRow(f"the {'answer' if role == 'assistant' else 'content'} is empty")
    call_id, name = (
        fields.text(message, key) if role == "tool" and message.get(key) is not None else ""
        for key in ("tool_call_id", "name")
    )
    return Turn(role, content, fields.calls(calls) if calls else "", call_id, name)


def _content(message: Mapping[str, Any], field: str, may_be_null: bool) -> str:
    """The content of a message: text, or a list of parts that are all text."""
    content = message.get(field)
    if content is None and may_be_null:
        return ""
    if not isinstance(content, list):
        return fields.text(message, field)
    for number, part in enumerate(content, 1):
        kind = part.get("type") if isinstance(part, dict) else type_name(part)
        if kind != "text":
            raise BadRow(f"part {number} of the content is {str(kind)[:40]!a}, not text")
    return "".join(fields.text(part, "text") for part in content)


# In order of precedence: the fields that recognise a format (a row may have others, too), and the
# conversion.
_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Conversation]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "alpaca": (("instruction", "output"), _alpaca),
    "dolly": (("instruction", "response"), lambda row: _alpaca(row, "context", "response")),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "text": (("text",), _plain_text),
}
