"""Rows, conversations and a tokenizer like the public ones that tests may not ship, made by rule.

Whoever has no copy of the real files runs the same tests on these. The texts hold what is hard to
tokenize and to mark: white space at both ends, line breaks, code, quotation marks, other scripts,
emoji, markup, one letter, many words.
"""

from __future__ import annotations

import gzip
import json
import random
import string
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

_SUBJECTS = ("The river", "A neighbour", "My sister", "Each engine", "This old map", "Nobody here")
_VERBS = ("crosses", "has forgotten", "repairs", "would like to see", "cannot find", "describes")
_OBJECTS = (
    "the bridge at 7:45",
    "a list of 128 names",
    "what you call 'home'",
    "three, four or five stones",
    "the café in Zürich",
    "an (almost) empty glass",
)
_ENDS = (".", "!", "...", ", and so do I.", "; nothing else matters.", " - at least today.")
_PIECES = (
    "def area(r):\n    return 3.14159 * r ** 2\n",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "1. First\n2. Second\n\n3. Third",
    'He said: "No." Then he left.',
    "https://example.org/a?b=c&d=%20",
    "Привет, мир. 你好。世界。",
    "Well done 🙂👍🏽",
    "naïve façade, über-cool, 5 °C",
    "\t indented by a tab",
    "x",
    "a   few    spaces",
    "It is <b>bold</b> &amp; <br/> [INST?]",
)
_LINES = ("Tell me more.", "Why?", "And then?", "Write it again, shorter.", "¿En español?", "42")


def _text(draw: random.Random) -> str:
    """One to five sentences; now and then something else in front, after or instead."""
    sentences = [
        " ".join(map(draw.choice, (_SUBJECTS, _VERBS, _OBJECTS))) + draw.choice(_ENDS)
        for _ in range(draw.randint(1, 5))
    ]
    parts = [draw.choice((" ", "\n", "\n\n")).join(sentences)]
    if draw.random() < 0.4:
        parts.insert(draw.randint(0, 1), draw.choice(_PIECES))
    if draw.random() < 0.1:
        parts = [draw.choice(_PIECES)]
    return draw.choice(("\n", "\n\n", " ")).join(parts)


def alpaca_rows(number: int = 420) -> list[dict[str, str]]:
    """Instruction, input and output; most without an input, a few without an output."""
    draw = random.Random("alpaca")
    rows = []
    for i in range(number):
        output = _text(draw)
        if draw.random() < 0.1:
            output = draw.choice((" ", "\n", "")) + output + draw.choice((" ", "\n", "  "))
        rows.append(
            {
                "instruction": _text(draw) + f" ({i})",
                "input": _text(draw) if draw.random() < 0.3 else "",
                "output": "" if i % 100 == 99 else output,
            }
        )
    return rows


def dolly_rows(number: int = 420) -> list[dict[str, str]]:
    """Rows with a category, some with longer inputs."""
    draw = random.Random("dolly")
    return [
        {
            "category": draw.choice(("open_qa", "closed_qa", "summarization")),
            "instruction": _text(draw) + f" ({i})",
            "input": "\n".join(_text(draw) for _ in range(draw.choice((0, 0, 3)))),
            "output": _text(draw),
        }
        for i in range(number)
    ]


def conversations(number: int = 160) -> list[dict[str, Any]]:
    """One, two or three exchanges in turn, in ShareGPT's layout."""
    draw = random.Random("conversations")
    return [
        {
            "id": f"talk_{i}",
            "conversations": [
                turn
                for k in range(1 + i % 3)
                for turn in (
                    {"from": "human", "value": draw.choice(_LINES) if k else _text(draw)},
                    {"from": "gpt", "value": _text(draw)},
                )
            ],
        }
        for i in range(number)
    ]


def tool_conversations(number: int = 40) -> list[dict[str, Any]]:
    """Conversations in which the assistant calls a tool, in ShareGPT's layout with `tools`."""
    draw = random.Random("tools")
    tools = [
        {
            "name": name,
            "description": f"Find out about {name}",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string"}, "days": {"type": "array"}},
                "required": ["place"],
            },
        }
        for name in ("get_weather", "list_trains")
    ]
    rows = []
    for i in range(number):
        call = {
            "name": draw.choice(tools)["name"],
            "arguments": {"place": draw.choice(("Zürich", 'the "old" town')), "days": [i, i + 1]},
        }
        turns = [("human", _text(draw)), ("gpt", _text(draw))] if i % 2 else []
        turns += [
            ("human", _text(draw)),
            ("function_call", json.dumps(call)),
            ("observation", json.dumps({"found": _text(draw)})),
            ("gpt", _text(draw)),
        ]
        rows.append(
            {
                "conversations": [{"from": role, "value": value} for role, value in turns],
                "tools": json.dumps(tools),
            }
        )
    return rows


def choice_rows(number: int = 12) -> list[dict[str, Any]]:
    """Questions with four answers, in ARC's layout."""
    draw = random.Random("choices")
    return [
        {
            "query": f"Question: {draw.choice(_SUBJECTS)} {draw.choice(_VERBS)} what? ({i})",
            "choices": draw.sample([*_OBJECTS, "Nothing", "42"], 4),
            "gold": draw.randrange(4),
        }
        for i in range(number)
    ]


def completion_rows(number: int = 12) -> list[dict[str, str]]:
    """Texts and their last word, in LAMBADA's layout."""
    draw = random.Random("completions")
    rows = []
    for _ in range(number):
        context, _, continuation = f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)}".rpartition(" ")
        rows.append({"context": f"{_text(draw)} {context}", "continuation": continuation})
    return rows


def write_gzip(path: Path, rows: list[Any]) -> Path:
    """Write rows, compressed: a line for each where the name says .jsonl, else one JSON list."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    text = lines if ".jsonl" in path.name else json.dumps(rows)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def sentencepiece_tokenizer(folder: Path) -> Any:
    """A tokenizer of the Llama-2 kind, saved in `folder`.

    Spaces are the letter `▁`, one is put in front of every text; a beginning token; characters that
    are not in the vocabulary become their bytes; no chat template.
    """
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = spaces
    # As sentencepiece learns: no piece crosses a space, holds two digits, or letters beside marks;
    # line breaks and tabs are bytes.
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(r"[\n\t]"), "removed"),
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    texts = [text for row in alpaca_rows() + dolly_rows() for text in row.values()]
    ascii = list(string.ascii_letters + string.digits + string.punctuation)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        initial_alphabet=ascii,
        limit_alphabet=len(ascii) + 8,  # and the most frequent others, the space among them
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    special = ["<unk>", "<s>", "</s>"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    whole = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": token,
                "special": True,
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for i, token in enumerate(special)
        ],
        "normalizer": json.loads(trained.to_str())["normalizer"],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": model["merges"],
        },
    }
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(whole)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    made.save_pretrained(folder)
    return made
