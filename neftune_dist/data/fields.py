"""Checked fields of a row: text that can be learned, and the JSON of functions and their calls."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from neftune_dist.data.errors import BadRow, parse_json, type_name

# Control characters other than white space: damage, or the escape codes of a terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")


def calls(listed: Any) -> str:
    """Tool calls as JSON in OpenAI's form, with arguments as an object, as templates take them.
    Raises `BadRow`."""
    if not isinstance(listed, list):
        raise BadRow(f"field 'tool_calls' is not a list but {type_name(listed)}")
    if len(listed) == 1 and isinstance(listed[0], list):  # one turn with several calls
        listed = listed[0]
    functions = []
    for number, call in enumerate(listed, 1):
        function = call.get("function", call) if isinstance(call, dict) else call
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            raise BadRow(f"call {number} is not an object with the 'name' of a function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed(function, "arguments")
        if not isinstance(arguments, dict):
            raise BadRow(
                f"the arguments of {name[:40]!a} are not an object but {type_name(arguments)}"
            )
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        functions.append(
            {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}
        )
    return _dumped(functions, "tool_calls")


def tools(row: Mapping[str, Any]) -> str:
    """The functions of the field `tools`, a list or its JSON, as JSON in OpenAI's form. Raises
    `BadRow`."""
    listed = row.get("tools")
    if isinstance(listed, str):
        listed = parsed(row, "tools") if listed.strip() else None
    if not listed:
        return ""
    if not isinstance(listed, list):
        raise BadRow(f"field 'tools' is not a list of functions but {type_name(listed)}")
    functions = []
    for number, tool in enumerate(listed, 1):
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"tool {number} is not an object with the 'name' of a function")
        functions.append({"type": "function", "function": function})
    return _dumped(functions, "tools")


def stripped(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with no white space around its keys. Raises `BadRow` where two become one."""
    names = [name.strip() for name in row]
    if names == list(row):
        return row
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        spelled = ", ".join(repr(name) for name in row if name.strip() == twice)
        raise BadRow(f"the keys {spelled} differ in white space alone")
    return dict(zip(names, row.values(), strict=True))


def parsed(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field of JSON text. Raises `BadRow`."""
    try:
        return parse_json(text(row, field))
    except BadRow as error:
        raise BadRow(f"field '{field}' is {error}") from None


def _dumped(value: Any, field: str) -> str:
    try:
        return _checked(json.dumps(value, ensure_ascii=False), field)
    except (TypeError, RecursionError) as error:  # a table may hold times or bytes
        raise BadRow(f"field '{field}' cannot be written as JSON ({error})") from None


def text(row: Mapping[str, Any], field: str) -> str:
    """The value of a text field that can be encoded. Raises `BadRow`."""
    if field not in row:
        raise BadRow(f"field '{field}' is missing")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"field '{field}' is not text but {type_name(value)}")
    return _checked(value, field)


def _checked(value: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"field '{field}' holds a lone surrogate, which is not text") from None
    if found := _CONTROL.search(value):
        raise BadRow(
            f"field '{field}' holds a control character, U+{ord(found[0]):04X}, at "
            f"character {found.start() + 1}"
        )
    return value
