"""Turns of a conversation out of a row's list, in OpenAI's, ShareGPT's and a few others' forms."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from neftune_dist.data import fields
from neftune_dist.data.conversation import ROLES, Turn
from neftune_dist.data.errors import BadRow, Hint, type_name

_OPENAI_ROLES = {**{role: role for role in ROLES}, "developer": "system"}
# Names of roles in ShareGPT files. A function call is the assistant's.
_ALIASES = {role: role for role in ROLES} | {"human": "user"}
_ALIASES |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "function_call"), "assistant")
_ALIASES |= {"observation": "tool"}
# Fields that are read, of a turn, a tool's turn, a call and its function.
_READ = {"tool_calls", *fields.MARKS, *fields.REASONING}
_OF_TOOL = {"tool_call_id", "name"}
_CALL = {"function", "id", "type", "index"}
_FUNCTION = {"name", "arguments", "id", "type", "index"}


def read_turns(row: Mapping[str, Any], field: str) -> list[Turn]:
    """The turns of a field of messages. Raises `BadRow` naming the turn that cannot be used."""
    messages = row[field]
    if isinstance(messages, dict):
        messages = _transposed(messages)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"field '{field}' is not a list of turns but {type_name(messages)}")
    is_openai = field in ("messages", "prompt", "completion")
    if not is_openai:
        messages = _as_messages(messages)
    turns = []
    for number, message in enumerate(messages, 1):
        try:
            turns.append(_turn(message, _OPENAI_ROLES if is_openai else _ALIASES))
        except BadRow as error:
            raise BadRow(f"turn {number}: ", *error.args) from None
    return turns


def _transposed(lists: dict[str, Any]) -> Any:
    """The turns of lists under the names of their fields, as old versions of `datasets` store
    them; anything else as it is."""
    columns = lists.values()
    if not all(isinstance(column, list) for column in columns) or len({*map(len, columns)}) != 1:
        return lists
    return [dict(zip(lists, values, strict=True)) for values in zip(*columns, strict=True)]


def _as_messages(listed: list[Any]) -> list[Any]:
    """Messages of exchanges: texts of the user and the assistant in turn (LIMA), or objects with an
    input and an output (Capybara)."""
    if all(isinstance(item, str) for item in listed):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(listed)]
    if not all(isinstance(item, dict) and {"input", "output"} <= item.keys() for item in listed):
        return listed
    messages = []
    for item in listed:
        rest = {name: value for name, value in item.items() if name not in ("input", "output")}
        messages.append({"role": "user", "content": item["input"]})
        messages.append({"role": "assistant", "content": item["output"], **rest})
    return messages


def _turn(message: Any, aliases: Mapping[str, str]) -> Turn:
    if not isinstance(message, dict):
        raise BadRow(f"not an object with 'role' and 'content' but {type_name(message)}")
    message = fields.stripped(message)
    by, said = "role", "content"
    if aliases is _ALIASES:  # either name of one with either name of the other
        by = "from" if "from" in message else by
        said = "value" if "value" in message else said
    if by not in message and "from" in message:
        raise BadRow(
            "field 'role' is missing; 'from' and 'value' are read from a field 'conversations' (",
            Hint({"conversations": "..."}),
            ")",
        )
    called = fields.text(message, by)
    role = aliases.get(called.lower() if aliases is _ALIASES else called)
    if role is None:
        raise BadRow(f"the role {called[:40]!a} is not known; known: {', '.join(aliases)}")
    if said not in message and not message.get("tool_calls"):
        raise BadRow(f"field '{said}' is missing; there are {', '.join(map(ascii, message))[:80]}")
    fields.refuse_unused(message, _READ | {by, said} | (_OF_TOOL if role == "tool" else set()))
    learned, reasoning = fields.is_learned(message), fields.reasoning(message)
    if role != "assistant" and (learned or reasoning):
        raise BadRow(f"a turn of the {role} is marked as trained on, or has a field of thoughts")
    is_learned = role != "assistant" or learned is not False
    if called.lower() == "function_call":
        made = _calls([fields.parsed(message, said)])
        return Turn(role, "", made, reasoning=reasoning, learned=is_learned)
    listed = message.get("tool_calls")
    if listed and role != "assistant":
        raise BadRow(f"field 'tool_calls' in a turn of the {role}")
    content = _content(message, said, bool(listed))
    if not content.strip() and not listed and role in ("user", "assistant"):
        raise BadRow(f"the {'answer' if role == 'assistant' else 'content'} is empty")
    if role == "user":
        fields.refuse_placeholder(content)
    call_id, name = (
        fields.text(message, key) if role == "tool" and message.get(key) is not None else ""
        for key in ("tool_call_id", "name")
    )
    made = _calls(listed) if listed else ""
    return Turn(role, content, made, call_id, name, reasoning, is_learned)


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
        fields.refuse_unused(part, {"type", "text"})
    return "".join(fields.text(part, "text") for part in content)


def _calls(listed: Any) -> str:
    """Tool calls as JSON in OpenAI's form, with arguments as an object, as templates take them.
    Raises `BadRow`."""
    if not isinstance(listed, list):
        raise BadRow(f"field 'tool_calls' is not a list but {type_name(listed)}")
    if len(listed) == 1 and isinstance(listed[0], list):  # one turn with several calls
        listed = listed[0]
    functions = []
    for number, call in enumerate(listed, 1):
        function = _function(call, f"call {number}")
        fields.refuse_unused(function, _FUNCTION)
        name, arguments = function["name"], function.get("arguments")
        if isinstance(arguments, str):
            arguments = fields.parsed(function, "arguments")
        if not isinstance(arguments, dict):
            raise BadRow(
                f"the arguments of {name[:40]!a} are not an object but {type_name(arguments)}"
            )
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        functions.append(
            {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return _dumped(functions, "tool_calls")


def read_tools(row: Mapping[str, Any]) -> str:
    """The functions of the field `tools`, a list or its JSON, as JSON in OpenAI's form. Raises
    `BadRow`."""
    listed = row.get("tools")
    if isinstance(listed, str):
        listed = fields.parsed(row, "tools") if listed.strip() else None
    if not listed:
        return ""
    if not isinstance(listed, list):
        raise BadRow(f"field 'tools' is not a list of functions but {type_name(listed)}")
    functions = [_function(tool, f"tool {number}") for number, tool in enumerate(listed, 1)]
    return _dumped([{"type": "function", "function": found} for found in functions], "tools")


def _function(found: Any, what: str) -> dict[str, Any]:
    """The function of a call or a tool, which may stand in a field or be the whole of it. Raises
    `BadRow`."""
    function = found.get("function", found) if isinstance(found, dict) else found
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise BadRow(f"{what} is not an object with the 'name' of a function")
    if function is not found:
        fields.refuse_unused(found, _CALL)
    return function  # type: ignore[no-any-return]


def _dumped(value: Any, field: str) -> str:
    try:
        return fields.checked(json.dumps(value, ensure_ascii=False, allow_nan=False), field)
    except (TypeError, ValueError, RecursionError) as error:  # times or bytes of a table, 1e400
        raise BadRow(f"field '{field}' cannot be written as JSON ({error})") from None
