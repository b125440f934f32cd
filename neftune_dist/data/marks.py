"""Conversations with marks in place of what is said: letters that occur nowhere else.

A template that renders marks shows where everything stands in its text, and what it leaves out or
writes twice, whatever the words of a row are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from neftune_dist.data.conversation import Conversation

MARK = re.compile(r"(Zq8vK\d+[cr]\d+Wj)")  # of a content or of reasoning
CALL_MARK = re.compile(r"Zq8vK\d+[fkv]\d+Wj")  # of a function called, and of its argument
END = re.compile(r"<[^<>\s]+>\Z|\[/?[A-Z_]+\]\Z")  # of a turn, as templates write it
# Words in angle or square brackets, which some templates look for in what is said.
_TAG = re.compile(r"(</?[\w|]{1,40}>|\[/?[A-Z_]{1,40}\])")


def marked(conversation: Conversation, fine: bool = False) -> tuple[Conversation, dict[str, str]]:
    """The conversation with marks in place of what is said, and what they stand for.

    Args:
        conversation: normalised.
        fine: tags in what is said stay, with a mark for each text between them.
    """
    pieces: dict[str, str] = {}

    def of(text: str, kind: str) -> str:
        parts = _TAG.split(text) if fine else [text]
        for k, part in enumerate(parts):
            if k % 2 == 0 and part.strip():
                parts[k] = f"Zq8vK{kind}{k}Wj"
                pieces[parts[k]] = part
        return "".join(parts)

    turns = tuple(
        turn._replace(
            content=of(turn.content, f"{i}c"), reasoning=of(turn.reasoning, f"{i}r"), learned=True
        )
        for i, turn in enumerate(conversation.turns)
    )
    return Conversation(turns, tools=conversation.tools), pieces


def with_functions(marked: Conversation) -> Conversation:
    """A marked conversation, with marks in place of its tools and calls, too."""
    ids: dict[str, str] = {}
    turns = []
    for i, turn in enumerate(marked.turns):
        calls = json.loads(turn.tool_calls) if turn.tool_calls else []
        for k, call in enumerate(calls):
            if "id" in call:  # nine letters and digits, as Mistral's templates demand
                call["id"] = ids[call["id"]] = f"call{i:03d}{k:02d}"
            name, key, value = (f"Zq8vK{i}{kind}{k}Wj" for kind in "fkv")
            call["function"] = {"name": name, "arguments": {key: value}}
        answered = ids.get(turn.tool_call_id, turn.tool_call_id)
        named = json.dumps(calls) if calls else ""
        turns.append(turn._replace(tool_calls=named, tool_call_id=answered))
    tools = []
    for k in range(len(marked.functions or [])):
        text = {"type": "string", "description": "Any."}
        schema = {"type": "object", "properties": {tool_marks(k)[1]: text}}
        name, _, meaning = tool_marks(k)
        function = {"name": name, "description": meaning, "parameters": schema}
        tools.append({"type": "function", "function": function})
    return Conversation(tuple(turns), tools=json.dumps(tools) if tools else "")


def tool_marks(k: int) -> tuple[str, str, str]:
    """The marks of a tool's name, of its parameter and of its description."""
    return f"Zq8vK{k}tWj", f"Zq8vK{k}pWj", f"Zq8vK{k}dWj"


def turn_of(mark: str) -> int:
    """The index of the turn whose mark it is."""
    return int(re.split("[cr]", mark.removeprefix("Zq8vK"))[0])


def forms(said: str) -> Iterator[str]:
    """What a template may make of a text: itself, or without white space around it, or as a JSON
    string, as some templates write results."""
    yield said
    core = said.strip()
    lead = said[: len(said) - len(said.lstrip())]
    trail = said[len(said.rstrip()) :]
    for before in (lead, lead.lstrip("\n"), ""):
        for after in (trail, trail.rstrip("\n"), ""):
            yield before + core + after
    for text in (said, core):
        yield json.dumps(text, ensure_ascii=False)[1:-1]
