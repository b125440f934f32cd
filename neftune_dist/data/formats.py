"""Formats of rows, recognised by their fields and converted to conversations.

    messages           messages of role, content, tool_calls (OpenAI's)
    sharegpt           conversations of from, value (or role, content); also a list of texts (LIMA)
                       or of exchanges with input, output (Capybara)
    alpaca             instruction, output (Evol-Instruct, Platypus too)
    dolly              instruction, response
    prompt_completion  prompt, completion (or another pair of `_PAIRS`): texts, or lists of messages
    text               text: supervised whole, without a template

All but the last may have a system prompt and tools. A field that would be learned wrongly, or left
out, makes the row a `BadRow` with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from neftune_dist.data import columns, fields
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow, Hint
from neftune_dist.data.turns import read_tools, read_turns

_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
    ("human", "assistant"),
)
# Texts that a question is about, by the name of the question's field.
_CONTEXTS = {"instruction": ("input", "context"), "question": ("context",)}
_SYSTEM = ("system", "system_prompt", "system_message")
_TASK_WORDS = 3  # a longer field `task` is an instruction, not the name of a kind of task
# About the characters of a document of 2^20 tokens, the largest `data.max_length`.
_MOST_CHARACTERS = 4 * 2**20

_Row = Mapping[str, Any]


def detect_format(row: _Row, usual: str = "") -> str:
    """The format whose fields the row has.

    Args:
        row: of a source.
        usual: the format of the rows before it, which is that of a row that matches none, and of
            one that would make plain texts and conversations mix; its reader refuses either.

    Raises:
        BadRow: no format matches.
    """
    found = next(iter(_matches(row).items()), None)
    if usual and (not found or (found[0] == "text") != (usual == "text")):
        return usual
    if found:
        return found[0]
    if "input_ids" in row:
        raise BadRow("the row holds tokens (input_ids): give the text that they were made of")
    _refuse_wrapper(row)
    for name in row:
        fields.refuse_meaning(name)
    hint = next((hint for hint in columns.suggestions(row) if _reads(hint, row)), None)
    if compared := next(filter(fields.is_compared, row), None):
        advice = [": ", hint, " reads the better one"]
        if hint is None:
            advice = [": give the better one as 'completion', and its question as 'prompt'"]
        raise BadRow(fields.compared_flaw(compared), *advice)
    known = "; ".join(", ".join(form.needed[0]) for form in _FORMATS.values())
    advice = [": to read them so, set ", hint] if hint else [f" ({known})"]
    raise BadRow(f"the fields {columns.listed(row)} are of no known format", *advice)


def _refuse_wrapper(row: _Row) -> None:
    """Raise `BadRow` for an object around rows, which a hint would read as one row: all as turns of
    one conversation, or the first alone."""

    def is_row(value: Any) -> bool:
        return isinstance(value, dict) and bool(_matches(value))

    if len(row) > 1 and all(map(is_row, row.values())):
        raise BadRow("it is an object of rows under names: write the rows alone, one a line")
    lists = [n for n, v in row.items() if isinstance(v, list) and v and all(map(is_row, v))]
    if not lists or not all(n in lists or fields.is_harmless(n, v) for n, v in row.items()):
        return
    found = row[lists[0]]
    parts: list[Any] = [
        f"field {lists[0][:40]!a} is a list of rows ({len(found)}), and this is no row: write them "
        "without what is around them, as an array or one a line"
    ]
    if ("input", "output") in _matches(found[0]).values():
        hint = Hint({"conversations": lists[0]})
        parts += ["; or, if they are the exchanges of one conversation, set ", hint]
    raise BadRow(*parts)


def _reads(hint: Hint, row: _Row) -> bool:
    """Whether the row can be used with the settings of a hint, which can be typed."""
    if not "".join((*(hint.columns or {}).values(), *hint.ignore)).isprintable():
        return False
    try:
        mapped = columns.Columns(hint.columns or {}, hint.ignore).apply(row)
        to_conversation(mapped, detect_format(mapped))
    except BadRow:
        return False
    return True


def to_conversation(row: _Row, format_name: str) -> Conversation:
    """Convert a row to a conversation with an answer, or a plain text.

    Trailing turns that nothing answers are left out in every format; in ShareGPT's also leading
    answers, because its files cut longer conversations anywhere. Both count in `num_left_out`.

    Raises:
        BadRow: names the field or the turn that is missing, wrong, or of no use.
    """
    form, matches = _FORMATS[format_name], _matches(row)
    names = matches.get(format_name)
    if names is None:
        hint = f": the row is of the format {next(iter(matches))}" if matches else ""
        field = next(field for field in form.needed[0] if field not in row)
        raise BadRow(f"field '{field}' is missing{hint}")
    conversation = form.convert(row, names)
    used = {*names, *form.optional, *_CONTEXTS.get(names[0], ())}
    if not row.keys() <= used:
        said = [turn.content for turn in conversation.turns if turn.role in ("user", "assistant")]
        said += [conversation.context] * bool(conversation.context)
        fields.refuse_unused(row, used, said)
    if fields.is_learned(row) is False:
        raise BadRow("the row is marked as not to be trained on")
    length = len(conversation.text) + len(conversation.context)
    length += sum(len(t.content) + len(t.tool_calls) + len(t.reasoning) for t in conversation.turns)
    if length > _MOST_CHARACTERS:
        raise BadRow(f"{length} characters are more than the {_MOST_CHARACTERS} of a document")
    return conversation


def _pair(row: _Row, names: Sequence[str]) -> Conversation:
    if _has_turns(row[names[0]]) or _has_turns(row[names[1]]):
        return _lists(row, names)
    said = fields.text(row, names[1])
    if not said.strip():
        raise BadRow("the answer is empty")
    if isinstance(task := row.get("task"), str) and len(task.split()) > _TASK_WORDS:
        raise BadRow(
            "field 'task' is a sentence, and would not be trained on: ",
            Hint({"instruction": "task"}),
            " puts it before the input, ",
            Hint(ignore=("task",)),
            " leaves it out",
        )
    return exchange(row, names[0], Turn("assistant", said, reasoning=fields.reasoning(row)))


def exchange(row: _Row, asked_in: str, answer: Turn) -> Conversation:
    """The question in a field of the row, with the text that it is about, and an answer. Raises
    `BadRow`."""
    about = _CONTEXTS.get(asked_in.lower(), ())
    asked = fields.text(row, asked_in)
    given = [fields.text(row, name) for name in about if row.get(name) not in (None, "")]
    if len(given) > 1:
        raise BadRow(f"fields {' and '.join(about)} both say what the {asked_in} is about")
    context = "".join(given)
    if not asked.strip():
        asked, context = context, ""
    if not asked.strip():
        raise BadRow(f"the {asked_in} is empty")
    fields.refuse_placeholder(asked)
    return _answered((Turn("user", asked), answer), row, context if context.strip() else "")


def _has_turns(value: Any) -> bool:
    return isinstance(value, list) and not all(isinstance(item, str) for item in value)


def _plain_text(row: _Row, names: Sequence[str]) -> Conversation:
    text = fields.text(row, "text")
    if not text.strip():
        raise BadRow("the text is empty")
    return Conversation((), text=text)


def _lists(row: _Row, names: Sequence[str]) -> Conversation:
    for name in (*_CONTEXTS.get(names[0], ()), *fields.REASONING):
        if row.get(name) not in (None, ""):
            raise BadRow(
                f"field '{name}' stands beside lists of turns, and would not be trained on: ",
                Hint(ignore=(name,)),
                " leaves it out",
            )
    before, after = (read_turns(row, name) for name in names)
    for number, turn in enumerate(before, 1):
        if turn.role == "assistant":
            raise BadRow(
                f"turn {number} of '{names[0]}' is an answer, which would be trained on with the "
                f"{names[1]}: give the turns as 'messages'"
            )
    if after[0].role != "assistant":
        raise BadRow(f"the {names[1]} begins with the role {after[0].role}, not assistant")
    return _answered((*before, *after), row)


def _messages(row: _Row, names: Sequence[str]) -> Conversation:
    turns = read_turns(row, names[0])
    if turns[0].role == "assistant":
        raise BadRow("the first turn is the assistant's, with nothing that it answers")
    return _answered(turns, row)


def _sharegpt(row: _Row, names: Sequence[str]) -> Conversation:
    """Roles must take turns, a system turn first: where the same one speaks twice, turns were lost
    between, so the conversation is refused, as FastChat does."""
    turns = read_turns(row, names[0])
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


def _answered(turns: Sequence[Turn], row: _Row, context: str = "") -> Conversation:
    """The conversation up to the last answer, with the row's system prompt and tools."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise BadRow("no turn is the assistant's")
    if not any([turns[i].learned for i in answers]):
        raise BadRow("every answer is marked as not to be trained on")
    ends = answers[-1] + 1
    turns, left_out = (*_system(row, turns[0]), *turns[:ends]), len(turns) - ends
    return Conversation(turns, context, read_tools(row), num_left_out=left_out)


def _system(row: _Row, first: Turn) -> tuple[Turn, ...]:
    """The system prompt of a field, where it is not the first turn as well."""
    given = {fields.text(row, name): name for name in _SYSTEM if row.get(name) not in (None, "")}
    if len(given) > 1:
        raise BadRow(f"fields {' and '.join(given.values())} hold different system prompts")
    if first.role == "system" and given.keys() - {first.content}:
        raise BadRow("the row has a field 'system' and a system turn as well")
    return () if first.role == "system" else tuple(Turn("system", said) for said in given)


@dataclass(frozen=True)
class _Format:
    """A format.

    Attributes:
        needed: the fields that recognise it, in each of its spellings; a row may have others, too.
        convert: makes a conversation of a row and the fields of it that were recognised.
        optional: further fields that are read.
    """

    needed: tuple[tuple[str, ...], ...]
    convert: Callable[[_Row, Sequence[str]], Conversation]
    optional: tuple[str, ...] = ()


_SHARED = (*_SYSTEM, "tools", *fields.MARKS)
_OF_PAIRS = (*_SHARED, "task", *fields.REASONING)
# In order of precedence.
_FORMATS = {
    "messages": _Format((("messages",),), _messages, _SHARED),
    "sharegpt": _Format((("conversations",), ("conversation",)), _sharegpt, _SHARED),
    "alpaca": _Format((("instruction", "output"),), _pair, _OF_PAIRS),
    "dolly": _Format((("instruction", "response"),), _pair, _OF_PAIRS),
    "prompt_completion": _Format(_PAIRS, _pair, _OF_PAIRS),
    "text": _Format((("text",),), _plain_text, (*fields.MARKS,)),
}


def _matches(row: _Row) -> Mapping[str, tuple[str, ...]]:
    """The formats whose fields the row has, with these fields: first those that are not null."""
    whole = frozenset([name for name, value in row.items() if value is not None])
    return _formats_of(frozenset(row), whole)


@lru_cache(4096)  # rows of a source have the same few sets of fields
def _formats_of(names: frozenset[str], whole: frozenset[str]) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for present in (whole, names):
        for name, form in _FORMATS.items():
            for needed in form.needed:
                if present.issuperset(needed):
                    found.setdefault(name, needed)
    return found
