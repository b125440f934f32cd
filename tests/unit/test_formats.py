"""Rows of every format, as conversations: nothing lost, nothing put in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from neftune_dist.config import SourceConfig
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import detect_format, to_conversation
from neftune_dist.data.sources import open_source
from tests.support import made_data
from tests.support.row_files import said, turns
from tests.support.shared_data import shared

ASKED = (Turn("user", "a"), Turn("assistant", "b"))
SYSTEM = Turn("system", "s")
MESSAGES = (("user", "a"), ("assistant", "b"))
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1, "é": None}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


CASES: dict[str, tuple[str, dict[str, Any], Conversation]] = {
    "alpaca": ("alpaca", {"instruction": "a", "input": "", "output": "b"}, Conversation(ASKED)),
    "alpaca with input": (
        "alpaca",
        {"instruction": "a", "input": "c", "output": "b", "task": "t"},
        Conversation(ASKED, "c"),
    ),
    "alpaca of nothing but an input": (
        "alpaca",
        {"instruction": " ", "input": "a", "output": "b"},
        Conversation(ASKED),
    ),
    "alpaca with system": (
        "alpaca",
        {"instruction": "a", "input": None, "output": "b", "system": "s"},
        Conversation((SYSTEM, *ASKED)),
    ),
    "evol-instruct": ("alpaca", {"instruction": "a", "output": "b"}, Conversation(ASKED)),
    "platypus": (
        "alpaca",
        {"input": "", "output": "b", "instruction": "a", "data_source": "MATH/PRM-800K"},
        Conversation(ASKED),
    ),
    "alpaca with its whole text": (
        "alpaca",
        {"instruction": "a", "input": "", "output": "b", "text": "Below is a. ### b"},
        Conversation(ASKED),
    ),
    "dolly": (
        "dolly",
        {"instruction": "a", "context": "c", "response": "b", "category": "qa"},
        Conversation(ASKED, "c"),
    ),
    "dolly without context": (
        "dolly",
        {"instruction": "a", "context": "", "response": "b"},
        Conversation(ASKED),
    ),
    "sharegpt": ("sharegpt", said(("human", "a"), ("gpt", "b"), id="x"), Conversation(ASKED)),
    "sharegpt, other names": (
        "sharegpt",
        said(("user", "a"), ("bing", "b"), ("HUMAN", "a"), ("ChatGPT", "b")),
        Conversation((*ASKED, *ASKED)),
    ),
    "sharegpt, more names": (
        "sharegpt",
        said(("user", "a"), ("bard", "b"), ("human", "a"), ("model", "b")),
        Conversation((*ASKED, *ASKED)),
    ),
    "sharegpt, names of both kinds": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "content": "a"},
                {"role": "gpt", "value": "b", "content": ""},
            ]
        },
        Conversation(ASKED),
    ),
    "sharegpt with a system turn": (
        "sharegpt",
        said(("system", "s"), ("human", "a"), ("gpt", "b")),
        Conversation((SYSTEM, *ASKED)),
    ),
    "sharegpt with a system field": (
        "sharegpt",
        said(("human", "a"), ("gpt", "b"), system="s"),
        Conversation((SYSTEM, *ASKED)),
    ),
    "sharegpt cut at both ends": (
        "sharegpt",
        said(("system", "s"), ("gpt", "x"), ("human", "a"), ("gpt", "b"), ("human", "y")),
        Conversation((SYSTEM, *ASKED), num_left_out=2),
    ),
    "sharegpt, two leading answers": (
        "sharegpt",
        said(("gpt", "x"), ("gpt", "y"), ("human", "a"), ("gpt", "b")),
        Conversation(ASKED, num_left_out=2),
    ),
    "wizardlm": (
        "sharegpt",
        turns(("user", "a"), ("assistant", "b"), field="conversations", idx=1),
        Conversation(ASKED),
    ),
    "sharegpt with tools": (
        "sharegpt",
        said(
            ("human", "a"),
            ("function_call", dumped({"name": "f", "arguments": {"x": 1, "é": None}})),
            ("observation", "7"),
            ("gpt", "b"),
            tools=dumped([TOOL["function"]]),
        ),
        Conversation(
            (
                Turn("user", "a"),
                Turn("assistant", "", dumped([CALL])),
                Turn("tool", "7"),
                Turn("assistant", "b"),
            ),
            tools=dumped([TOOL]),
        ),
    ),
    "sharegpt with two calls, and calls in the content": (
        "sharegpt",
        said(
            ("human", "a"),
            ("function_call", dumped([CALL["function"], CALL["function"]])),
            ("tool", "7"),
            ("tool", "8"),
            ("gpt", "<call>"),
            ("tool", ""),
            ("gpt", "b"),
            tools=" ",
        ),
        Conversation(
            (
                Turn("user", "a"),
                Turn("assistant", "", dumped([CALL, CALL])),
                Turn("tool", "7"),
                Turn("tool", "8"),
                Turn("assistant", "<call>"),
                Turn("tool", ""),
                Turn("assistant", "b"),
            )
        ),
    ),
    "messages": (
        "messages",
        turns(("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), prompt=" a"),
        Conversation((Turn("system", ""), *ASKED), num_left_out=1),
    ),
    "messages in parts": (
        "messages",
        turns(
            ("developer", "s"),
            ("user", [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]),
            ("assistant", "b"),
        ),
        Conversation((SYSTEM, *ASKED)),
    ),
    "messages with tools": (
        "messages",
        {
            "messages": [
                {"role": "user", "content": "a", "tool_calls": None},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"x": 1, "é": null}'},
                        }
                    ],
                },
                {"role": "tool", "content": "7", "tool_call_id": "call_1", "name": "f"},
                {"role": "assistant", "content": "b", "refusal": None, "weight": 1},
            ],
            "tools": [TOOL],
        },
        Conversation(
            (
                Turn("user", "a"),
                Turn("assistant", "", dumped([{"id": "call_1", **CALL}])),
                Turn("tool", "7", "", "call_1", "f"),
                Turn("assistant", "b"),
            ),
            tools=dumped([TOOL]),
        ),
    ),
    "prompt and completion": (
        "prompt_completion",
        {"prompt": "a", "completion": "b", "input": "", "system": "s", "tools": [TOOL]},
        Conversation((SYSTEM, *ASKED), tools=dumped([TOOL])),
    ),
    "prompt and completion of messages": (
        "prompt_completion",
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
        Conversation((SYSTEM, *ASKED)),
    ),
    "text": ("text", {"text": " a\n", "url": "x"}, Conversation((), text=" a\n")),
    # Sets as their authors publish them.
    "openorca": (
        "prompt_completion",
        {"id": "niv.1", "system_prompt": "s", "question": "a", "response": "b"},
        Conversation((SYSTEM, *ASKED)),
    ),
    "metamath": (
        "prompt_completion",
        {"type": "GSM_SV", "query": "a", "original_question": "o", "response": "b"},
        Conversation(ASKED),
    ),
    "a question about a text": (
        "prompt_completion",
        {"question": "a", "context": "c", "answer": "b", "answer_start": 3},
        Conversation(ASKED, "c"),
    ),
    "input and output": ("prompt_completion", {"input": "a", "output": "b"}, Conversation(ASKED)),
    "human and assistant": (
        "prompt_completion",
        {"human": "a", "assistant": "b", "created_at": "yesterday", "conversationId": "x"},
        Conversation(ASKED),
    ),
    "tulu": ("messages", turns(*MESSAGES, id="x", source="flan"), Conversation(ASKED)),
    "ultrachat, no robots": (
        "messages",
        turns(*MESSAGES, prompt="a", prompt_id="x", category="Chat"),
        Conversation(ASKED),
    ),
    "openhermes": (
        "sharegpt",
        said(
            *(("human", "a"), ("gpt", "b")),
            **{"system_prompt": "s", "idx": "3", "avatarUrl": "x", "views": 7, "title": "t"},
            **{"model_name": "m", "hash": 5, "topic": None, "custom_instruction": False},
        ),
        Conversation((SYSTEM, *ASKED)),
    ),
    "the same system prompt twice": (
        "sharegpt",
        said(("system", "s"), ("human", "a"), ("gpt", "b"), system="s"),
        Conversation((SYSTEM, *ASKED)),
    ),
    "lima": ("sharegpt", {"conversations": ["a", "b"], "source": "x"}, Conversation(ASKED)),
    "capybara": (
        "sharegpt",
        {"source": "x", "conversation": [{"input": "a", "output": "b"}] * 2},
        Conversation((*ASKED, *ASKED)),
    ),
    "wildchat": (
        "sharegpt",
        {
            **turns(*MESSAGES, field="conversation", language="English", toxic=True),
            **{"conversation_hash": "x", "turn": 1, "openai_moderation": [{"flagged": False}]},
            "header": {"accept-language": "en"},
        },
        Conversation(ASKED),
    ),
    "null columns are no columns": (
        "prompt_completion",
        {"messages": None, "instruction": None, "output": None, "prompt": "a", "completion": "b"},
        Conversation(ASKED),
    ),
    "keys with spaces in a turn": (
        "messages",
        {"messages": [{"role": "user", "content": "a"}, {"role ": "assistant", " content": "b"}]},
        Conversation(ASKED),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_format(name: str) -> None:
    format_name, row, expected = CASES[name]
    assert detect_format(row) == format_name
    assert to_conversation(row, format_name) == expected


LEARNED = ("train", "training", "trainable", "learn", "loss", "loss_mask", "weight", "supervised")


@pytest.mark.parametrize("kind", ["messages", "conversations"])
@pytest.mark.parametrize("name", [*LEARNED, "masked", "ignore"])
def test_marks_say_which_answers_are_learned(name: str, kind: str) -> None:
    """Also what users' turns are not; null is no mark."""
    row = turns(*MESSAGES, *MESSAGES, *MESSAGES, field=kind)
    words: list[tuple[Any, Any]] = [(False, True), (0, 1), (0.0, 1.0), ("false", "True")]
    for no, yes in words:
        if name not in LEARNED:
            no, yes = yes, no
        marks = (no, None, None, no, no, yes)
        for turn, mark in zip(row[kind], marks, strict=True):
            turn[name] = mark
        made = to_conversation(row, detect_format(row))
        assert [turn.learned for turn in made.turns] == [True, True, True, False, True, True]


THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "tool_plan")
THOUGHTS += ("think", "thinking_content", "thought_process", "chain_of_thought", "cot")


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_are_kept_apart_from_the_answer(name: str) -> None:
    row = turns(*MESSAGES, *MESSAGES)
    row["messages"][1] |= {name: "so", "reasoning_details": [{"type": "x", "text": "so"}]}
    row["messages"][3] |= {name: "", "reasoning_details": None}
    made = to_conversation(row, "messages")
    assert [turn.reasoning for turn in made.turns] == ["", "so", "", ""]
    assert [turn.content for turn in made.turns] == ["a", "b"] * 2
    pair = to_conversation({"question": "a", "answer": "b", name: "so"}, "prompt_completion")
    assert pair.turns[1] == Turn("assistant", "b", reasoning="so")


def test_messages_are_what_a_chat_template_takes() -> None:
    made = to_conversation(CASES["messages with tools"][1], "messages")
    assert made.messages() == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", **CALL}]},
        {"role": "tool", "content": "7", "tool_call_id": "call_1", "name": "f"},
        {"role": "assistant", "content": "b"},
    ]
    assert made.opening() == made.messages()[:1]
    assert to_conversation({"text": "a"}, "text").opening() == []


@pytest.mark.parametrize("system", ["", "s"])
def test_an_input_follows_its_instruction(system: str) -> None:
    row = {"instruction": "a", "input": "c", "output": "b", "system": system}
    conversation = to_conversation(row, "alpaca")
    first = [{"role": "system", "content": "s"}] if system else []
    asked = {"role": "user", "content": "a\n\nc"}
    assert conversation.messages() == [*first, asked, {"role": "assistant", "content": "b"}]
    assert conversation.opening() == conversation.messages()[:-1]


@pytest.mark.parametrize(
    "name", [name for name in CASES if "messages" in name and "parts" not in name]
)
def test_the_same_out_of_a_table(name: str, tmp_path: Path) -> None:
    """Where every turn has all fields of any of them, as nulls."""
    format_name, row, expected = CASES[name]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    [(_, stored)] = open_source(SourceConfig(str(path))).rows
    assert isinstance(stored, dict)
    made = to_conversation(stored, format_name)
    assert [turn.content for turn in made.turns] == [turn.content for turn in expected.turns]
    assert [turn.role for turn in made.turns] == [turn.role for turn in expected.turns]


# Files of every kind, read whole.

FILES = {
    "alpaca_union.json.gz": ("alpaca", 15_130, 9),
    "dolly_3k.json.gz": ("alpaca", 2_996, 0),
    "rasbt_instruction_1100.json.gz": ("alpaca", 1_100, 0),
    "fastchat_dummy_conversation.json.gz": ("sharegpt", 500, 0),
    "llamafactory_glaive_toolcall.json.gz": ("sharegpt", 300, 0),
}


@pytest.mark.parametrize("name", FILES)
def test_real_files_read_whole(name: str) -> None:
    check_read_whole(shared(f"data/train/{name}"), *FILES[name])


def test_made_files_read_whole(tmp_path: Path) -> None:
    for format_name, rows, num_bad in (
        ("alpaca", made_data.alpaca_rows(), 4),
        ("alpaca", made_data.dolly_rows(), 0),
        ("sharegpt", made_data.conversations(), 0),
        ("sharegpt", made_data.tool_conversations(), 0),
    ):
        path = made_data.write_gzip(tmp_path / "rows.json.gz", rows)
        check_read_whole(path, format_name, len(rows), num_bad)


def check_read_whole(path: Path, format_name: str, num_rows: int, num_bad: int) -> None:
    raw = json.loads(gzip.decompress(path.read_bytes()))
    bad = []
    for original, (place, row) in zip(raw, open_source(SourceConfig(str(path))).rows, strict=True):
        assert row == original and isinstance(row, dict)
        assert detect_format(row) == format_name
        try:
            made = to_conversation(row, format_name)
        except BadRow as error:
            bad.append(f"{place}: {error}")
            continue
        if format_name == "alpaca":
            assert (made.turns[0].content, made.context) == (row["instruction"], row["input"])
            assert made.turns[1:] == (Turn("assistant", row["output"]),)
            continue
        assert len(made.turns) == len(row["conversations"])
        for turn, spoken in zip(made.turns, row["conversations"], strict=True):
            if spoken["from"] == "function_call":
                [call] = json.loads(turn.tool_calls)
                assert call["function"] == json.loads(spoken["value"])
            else:
                assert turn.content == spoken["value"] and not turn.tool_calls
        listed = [tool["function"] for tool in json.loads(made.tools or "[]")]
        assert listed == json.loads(row.get("tools", "[]"))
    assert len(raw) == num_rows and len(bad) == num_bad
    assert all(reason.endswith(": the answer is empty") for reason in bad)
