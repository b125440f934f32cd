"""Fields of rows, turns and calls: checked text, learning marks and thoughts.

A field is used, or harmless by its name or its type, or the row is a `BadRow` that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from functools import lru_cache
from numbers import Number
from textwrap import shorten
from typing import Any

from neftune_dist.data.errors import BadRow, Hint, parse_json, type_name

# Control characters other than white space: damage, or the escape codes of a terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_MOST_NAMES = 20  # of fields in a hint
_EMPTY: tuple[Any, ...] = (None, "", [], {})

# Fields that say nothing of what is learned, by their last word in snake case or their whole name.
_HARMLESS = re.compile(
    r"(?!(target|output|tgt)_)(\w+_)?(ids?|idx|index|uuid|hash|md5|sha256|urls?|uri|links?|date|time|timestamp|scores?"
    r"|ratings?|rank|lang|languages?|locale|models?|sources?|datasets?|origin|provenance|types?"
    r"|category|categories|subcategory|tags?|topics?|domain|tasks?|split|licen[cs]e|copyright"
    r"|version|revision|authors?|annotators?|workers?|difficulty|level|quality|moderation|toxicity"
    r"|counts?|usage|meta|metadata|(created|updated|modified)(_at)?"
    r"|(model|file|dataset|task|user|source|set|split)_?name|file|path)"
    r"|original_\w+|title|subject|kind|generator|engine|country|state|header|hashed_ip|toxic"
    r"|redacted|finish_reason|stop_reason|logprobs"
    r"|parallel_tool_calls|cache_control|__index_level_\d+__|unnamed:_\d+"
)
# Names of a yes or no, which may be written as 0 or 1, and then is no score.
_FLAG = re.compile(
    r"((is|has|was|can|should|do|dont|not|no|use|enable|with)_\w+|use|used|keep|skip|include|exclude"
    r"|ignore|drop|enabled|valid|correct|good|bad|accepted|approved|target|unlearn|backprop)"
)
# Harmless as a yes or no alone: what else stands there is meant for the model.
_SWITCH = re.compile("custom_instructions?|skip_prompt_formatting")
_LONG_TEXT = 200  # characters; a longer text with spaces is more than an id, a source or a title
# Harmless whatever they hold.
_ANY_LENGTH = re.compile(r"(\w+_)?(meta|metadata|moderation|usage)|original_\w+|logprobs|header")
# Fields that say something which would not be trained on, and what they are.
_MEANINGS = {
    r"(\w+_)?labels?|kto_\w+|(un)?desirable|prefer(red|ence)": "marks answers as good or bad "
    "(KTO): keep the good rows, and leave the field out",
    r"(image|picture|audio|video)s?(_(url|path|file|bytes)s?)?|pixel_values": "is what a text "
    "model cannot see or hear, and the answer may need",
    "history": "holds turns: give all turns as 'messages'",
    r"(\w+_)?(train(ed|able|ing)?|learn(ed|able|ing)?|loss(es)?|(un)?mask(s|ed)?|supervis(ed?|ion)"
    r"|weights?|grads?)(_\w+)?": "may say whether "
    "an answer is supervised: call it loss_mask (1: supervised) or masked (true: not), or leave it "
    "out by data.ignore_fields",
}
_MEANING = {re.compile(names): meaning for names, meaning in _MEANINGS.items()}
# Two answers to compare.
_COMPARED = re.compile(
    r"chosen|rejected|(non_)?preferred_output"
    r"|(\w+_)?(response|answer|completion|output|conversation)_?[abjk012]"
)
# A text that stands for a picture in what the user says.
_PLACEHOLDER = re.compile(
    r"<\|?((?:image|img|audio|video)(?:_pad|_\d+)?)\|?>|\[IMG\]|<start_of_image>"
)
_MEDIA_FILE = re.compile(r"\S+\.(png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|flac|ogg|mp4|webm|mov|avi)")
# Columns that name a row's split, and the splits that are not to be learned.
_SPLIT = re.compile(r"(\w+_)?(split|subset|partition|fold|set)")
_NOT_TRAINED = re.compile(r"test(ing)?|valid(ation)?|val|dev|eval(uation)?|held_?out|holdout")
# Columns that may hold a whole conversation as another program wrote it.
_WHOLE = re.compile(r"(\w+_)?(text|prompt|chat|conversation)|(formatted|rendered|templated)_\w+")

# Whether an answer is learned, by the words of other trainers; the second are true where it is not.
_LEARNED = (
    *("train", "training", "trainable", "trained", "learn", "learnable", "learned"),
    *("loss", "loss_mask", "loss_weight", "weight", "supervise", "supervised"),
)
_NOT_LEARNED = ("masked", "ignore", "ignored")
MARKS = frozenset((*_LEARNED, *_NOT_LEARNED))
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
# An assistant's thoughts before its answer or its calls.
_THOUGHTS = (
    *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "tool_plan", "think"),
    *("thinking_content", "thought_process", "reasoning_text", "chain_of_thought", "cot"),
)
_DETAILS = "reasoning_details"
_SWITCHES = {"on", "off", "yes", "no", "true", "false", "low", "medium", "high", "none", "auto"}
REASONING = frozenset((*_THOUGHTS, _DETAILS))


def refuse_unused(
    found: Mapping[str, Any], used: AbstractSet[str], repeated: Iterable[str] = ()
) -> None:
    """Raise `BadRow` for fields that would be left out although they may change what is learned.

    Args:
        found: a row, a turn or a call.
        used: names of the fields that are read.
        repeated: texts that are learned. A field that repeats one says no more, nor does one that
            holds all and is named so.
    """
    if found.keys() <= used:
        return
    unused = []
    for name, value in found.items():
        if name in used or value in _EMPTY:
            continue
        if is_compared(name):
            compared = tuple(field for field in found if is_compared(field) and field not in used)
            raise BadRow(f"{compared_flaw(name)}: ", Hint(ignore=compared), " leaves it out")
        refuse_meaning(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                _refuse_value(name, text)
        if not (is_harmless(name, value) or _repeats(name, value, repeated)):
            unused.append(name)
    if unused:
        names = shorten(", ".join(ascii(name)[1:-1] for name in unused), 60)
        raise BadRow(
            f"field{'s' * (len(unused) > 1)} '{names}' would not be trained on: data.columns "
            "uses a field, ",
            Hint(ignore=tuple(unused[:_MOST_NAMES])),
            " leaves it out",
        )


def refuse_meaning(name: str) -> None:
    """Raise `BadRow` for a field of preferences, of pictures or the like, by its name."""
    if meaning := _meaning_of(name):
        raise BadRow(f"field '{name}' {meaning}")


def is_compared(name: str) -> bool:
    """Whether a field is one of two answers to compare, by its name."""
    return _COMPARED.fullmatch(_snake(name)) is not None


def compared_flaw(name: str) -> str:
    """Why such a field cannot be learned."""
    return f"field '{name}' is one of two answers to compare (DPO)"


def _refuse_value(name: str, value: str) -> None:
    """Raise `BadRow` for the name of a picture's file, and for a row of another split."""
    if _MEDIA_FILE.fullmatch(value.lower()):
        raise BadRow(
            f"field '{name}' is {shorten(ascii(value), 60)}, which a text model cannot see or hear"
        )
    if _SPLIT.fullmatch(_snake(name)) and _NOT_TRAINED.fullmatch(value.lower()):
        raise BadRow(
            f"field '{name}' says that the row is of the split {value!a}: put the rows to train on "
            "into a file of their own, or use all by ",
            Hint(ignore=(name,)),
        )


def is_harmless(name: str, value: Any) -> bool:
    """Whether a field says nothing of what is learned: it is empty, a number, or named so."""
    if value in _EMPTY:
        return True
    snake = _snake(name)
    if isinstance(value, Number) and not isinstance(value, bool):
        return str(value) not in _TRUTHS or not _FLAG.fullmatch(snake)
    if _SWITCH.fullmatch(snake):
        return str(value).lower() in _TRUTHS
    return _is_harmless_name(snake) and (
        not _holds_long_text(value) or _ANY_LENGTH.fullmatch(snake) is not None
    )


def _holds_long_text(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) > _LONG_TEXT and " " in value.strip()
    parts = value.values() if isinstance(value, dict) else value
    return isinstance(value, list | dict) and any(map(_holds_long_text, parts))


@lru_cache(4096)
def _meaning_of(name: str) -> str:
    found = (meaning for names, meaning in _MEANING.items() if names.fullmatch(_snake(name)))
    return next(found, "")


@lru_cache(4096)
def _is_harmless_name(snake: str) -> bool:
    return _HARMLESS.fullmatch(snake) is not None


@lru_cache(4096)
def _snake(name: str) -> str:
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:80]).lower()
    return re.sub(r"[-. ]", "_", snake)


def _repeats(name: str, value: Any, texts: Iterable[str]) -> bool:
    if not isinstance(value, str):
        return False
    learned = [text.strip() for text in texts]
    is_whole = bool(learned) and _WHOLE.fullmatch(_snake(name)) is not None
    return value.strip() in learned or (is_whole and all(text in value for text in learned))


def refuse_placeholder(said: str) -> None:
    """Raise `BadRow` where a text stands for a picture, as in LLaVA's rows."""
    for found in _PLACEHOLDER.finditer(said) if "<" in said or "[IMG]" in said else ():
        # Elsewhere a question may be about these words of HTML, whose img has no end.
        is_html = found[0] in ("<img>", "<audio>", "<video>")
        at_end = not said[: found.start()].strip() or not said[found.end() :].strip()
        is_markup = found[1] != "img" and f"</{found[1]}>" in said
        if (at_end or not is_html) and not is_markup:
            raise BadRow(f"{found[0]} stands for what a text model cannot see or hear")


def is_learned(found: Mapping[str, Any]) -> bool | None:
    """Whether a turn's or a row's marks say that it is learned; None without marks. Raises `BadRow`
    where they contradict each other."""
    if MARKS.isdisjoint(found):
        return None
    marks: dict[str, bool] = {}
    for name in MARKS & found.keys():
        if (value := found[name]) is None:
            continue
        truth = _TRUTHS.get(str(value).lower())
        if truth is None:
            raise BadRow(
                f"field '{name}' is {shorten(ascii(value), 40)}, neither 0 nor 1: an answer "
                "is supervised as a whole, or not at all (",
                Hint(ignore=(name,)),
                ")",
            )
        marks[name] = truth != (name in _NOT_LEARNED)
    if len({*marks.values()}) > 1:
        raise BadRow(f"fields {', '.join(sorted(marks))} contradict each other")
    return next(iter(marks.values()), None)


def reasoning(found: Mapping[str, Any]) -> str:
    """The thoughts of an answer that are stored apart from it; "" without. Raises `BadRow` where
    two fields hold different ones."""
    if REASONING.isdisjoint(found):
        return ""
    thoughts = {name: text(found, name) for name in _THOUGHTS if found.get(name) not in _EMPTY}
    if (details := found.get(_DETAILS)) not in _EMPTY:
        parts: list[Any] = details if isinstance(details, list) else [details]
        if not all(isinstance(part, dict) for part in parts):
            raise BadRow(f"field '{_DETAILS}' is not a list of objects with a 'text'")
        thoughts[_DETAILS] = "".join(text(part, "text") for part in parts)
    for name, thought in thoughts.items():
        if thought.strip().lower() in _SWITCHES:
            raise BadRow(
                f"field '{name}' is {thought!a}, a switch for reasoning and not a thought: ",
                Hint(ignore=(name,)),
                " leaves it out",
            )
    if len({thought.strip() for thought in thoughts.values()}) > 1:
        raise BadRow(f"fields {' and '.join(thoughts)} hold different thoughts")
    return next(iter(thoughts.values()), "")


def stripped(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with no white space around its keys. Raises `BadRow` where two become one."""
    names = [name.strip() for name in row]
    if names == list(row):
        return row
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        spelled = ", ".join(ascii(name[:40]) for name in row if name.strip() == twice)
        raise BadRow(f"the keys {spelled} differ in white space alone")
    return dict(zip(names, row.values(), strict=True))


def parsed(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field of JSON text. Raises `BadRow`."""
    try:
        return parse_json(text(row, field))
    except BadRow as error:
        raise BadRow(f"field '{field}' is {error}") from None


def text(row: Mapping[str, Any], field: str) -> str:
    """The value of a text field that can be encoded. Raises `BadRow`."""
    if field not in row:
        raise BadRow(f"field '{field}' is missing")
    value = row[field]
    if not isinstance(value, str):
        raise BadRow(f"field '{field}' is not text but {type_name(value)}")
    return checked(value, field)


def checked(value: str, field: str) -> str:
    """The text, where it can be encoded and holds no control character. Raises `BadRow`."""
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
