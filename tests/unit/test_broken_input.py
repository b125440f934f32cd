"""Input that is broken, and the sentence that each kind gives: which file, row and turn, and what
is wrong. Good rows around a bad one are kept."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from neftune_dist.config import DataConfig, SourceConfig, UserError
from neftune_dist.data.dataset import prepare
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import detect_format, to_conversation
from neftune_dist.data.sources import open_source
from tests.support.row_files import ROWS, array, lines, parquet, read, said, table, turns, zstd

GOOD = {"instruction": "Say hello.", "output": "Hello."}


def sentence(path: Path | str) -> str:
    with pytest.raises(UserError) as raised:
        read(path)
    text = str(raised.value)
    assert "\n" not in text and f"data.source={path}"[:200] in text, text
    return text


# Sources that cannot be found.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/nowhere/rows.jsonl", "does not exist"),
        ("nowhere/rows.json.gz", "does not exist"),
        ("./rows", "does not exist"),
        ("~nosuchuser/rows.json", "names no known user"),
        ("/" + "a" * 5000, "is too long"),
        ("/nowhere/*.jsonl", "matches no file"),
        ("no-one/no-data", "not a local file, and the dataset of that name could not be loaded"),
        ("nodata", "could not be loaded from the hub"),
        ("a b", "neither a file nor a hub id"),
        ("a/b/c", "neither a file nor a hub id"),
        ("http://host/rows", "neither a file nor a hub id"),
    ],
)
def test_a_source_that_is_nowhere(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=r"^data\.source=") as raised:
        read(name)
    assert reason in str(raised.value)


# Files that cannot be read.

CSV = table(ROWS, ",", "\n")
FILES: dict[str, tuple[bytes, str]] = {
    "rows.txt": (lines(ROWS), "cannot be read: give a .json, .jsonl, .csv or .tsv"),
    "rows": (lines(ROWS), "cannot be read: give a .json"),
    "rows.json.bz2": (lines(ROWS), "cannot be read: give a .json"),
    "rows.parquet.gz": (b"", "cannot be read: give a .json"),
    "cut.json": (array(ROWS)[:-9], "not valid JSON after row 2: Unterminated string"),
    "half.json": (array(ROWS)[:-1], "after row 3: the array ends without ']'"),
    "no_comma.json": (b'[{"a": 1} {"b": 2}]', "after row 1: the array ends without ']', or a ','"),
    "comma.json": (b'[{"a": 1},]', "after row 1: a comma stands before the end"),
    "more.json": (b'[{"a": 1}]\n{"b": 2}', "after row 1: more text follows the array"),
    "deep.json": (b"[" * 100_000, "is not valid JSON: it is nested too deeply"),
    "digits.json": (b"[" + b"1" * 5000 + b"]", "is not valid JSON: Exceeds the limit"),
    "nul.json": (b'[{"a": "\0"}]', "is not valid JSON: Invalid control character"),
    "latin.json": ('[{"a": "é"}]'.encode("latin-1"), "is not UTF-8 text"),
    "one_object.json": (
        json.dumps({"data": ROWS}, indent=1).encode(),
        "is one object over several",
    ),
    "zipped.json": (gzip.compress(lines(ROWS)), "it is a .gz file and should be named so"),
    "packed.jsonl": (zstd(lines(ROWS)), "it is a .zst file and should be named so"),
    "table.csv": (b"PAR1....", "it is a .parquet file and should be named so"),
    "cut.jsonl.gz": (gzip.compress(lines(ROWS * 9))[:-9], "is a damaged gzip file"),
    "flipped.json.gz": (gzip.compress(array(ROWS))[:-6] + b"x" * 6, "is a damaged gzip file"),
    "plain.jsonl.gz": (lines(ROWS), "is a damaged gzip file: Not a gzipped file"),
    "empty.json.gz": (b"\x1f\x8b", "is a damaged gzip file"),
    "cut.jsonl.zst": (zstd(lines(ROWS))[:-5], "is a damaged zstd file"),
    "plain.csv.zst": (CSV, "is a damaged zstd file"),
    "empty.jsonl.zst": (b"", "is a damaged zstd file: it is empty"),
    "latin.csv": ("prompt,completion\na,b\nc,é\n".encode("latin-1"), "is not UTF-8 text"),
    "utf16.csv": (CSV.decode().encode("utf-16"), "is not valid CSV: it is UTF-16 text"),
    "utf16.json": (array(ROWS).decode().encode("utf-16"), "is not valid JSON: it is UTF-16 text"),
    "twice.csv": (b"prompt,completion,prompt\na,b,c\n", "the header, names 'prompt' twice"),
    "unnamed.csv": (b"prompt,,completion\na,b,c\n", "the header, has a column without a name"),
    "quote.csv": (b'"prompt,completion\na,b\n', "is not valid CSV: unexpected end of data"),
    "text.parquet": (lines(ROWS), "is not a readable Parquet file"),
    "empty.parquet": (b"", "is not a readable Parquet file"),
    "text.arrow": (lines(ROWS), "is not a readable Arrow file"),
    "empty.arrow": (b"", "is not a readable Arrow file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    content, reason = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert reason in sentence(tmp_path / name)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    one, two = pyarrow.array(["a"]), pyarrow.array(["b"])
    struct = pyarrow.StructArray.from_arrays([one, two], ["content", "content"])
    tables = {
        "top": pyarrow.Table.from_arrays([one, two], ["output", "output"]),
        "turn": pyarrow.table({"turn": struct}),
    }
    for name, doubled in tables.items():
        pyarrow.parquet.write_table(doubled, tmp_path / f"{name}.parquet")
        with pyarrow.ipc.new_stream(str(tmp_path / f"{name}.arrow"), doubled.schema) as writer:
            writer.write_table(doubled)
    for kind in ("parquet", "arrow"):
        assert "two columns of the name 'output'" in sentence(tmp_path / f"top.{kind}")
        assert "two columns of the name 'content'" in sentence(tmp_path / f"turn.{kind}")


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.parquet"
    text = pyarrow.array([b"\xe9\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": ["b"]}), path)
    assert "is not a readable Parquet file" in sentence(path) or "not UTF-8" in sentence(path)


def test_a_parquet_file_that_was_cut(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ROWS)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-10])
    assert "is not a readable Parquet file" in sentence(tmp_path / "a.parquet")


def test_damaged_pages_of_a_parquet_file_are_one_sentence(tmp_path: Path) -> None:
    """pyarrow's own message has several lines."""
    parquet(tmp_path / "a.parquet", ROWS)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:24] = b"\xff" * 20  # the first page's header
    (tmp_path / "a.parquet").write_bytes(content)
    assert "is not a readable Parquet file" in sentence(tmp_path / "a.parquet")


def test_a_directory_without_rows(tmp_path: Path) -> None:
    assert "is a directory without a .json" in sentence(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "state.json").write_text("{}")
    assert "is a directory without a .json" in sentence(tmp_path)


def test_a_glob_of_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "a.md").touch()
    assert f"matches {tmp_path}/a.md, which cannot be read" in sentence(f"{tmp_path}/a.*")


def test_damage_after_good_rows_is_placed(tmp_path: Path) -> None:
    """What was read before the damage must not pass for the whole."""
    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    content = gzip.compress(lines([{"n": i, "text": "x" * 97} for i in range(9000)]))[:-40]
    (tmp_path / "b.jsonl.gz").write_bytes(content)
    rows = open_source(SourceConfig(str(tmp_path))).rows
    assert next(rows)[0] == "a.jsonl, row 1"
    with pytest.raises(UserError, match=r"b\.jsonl\.gz is a damaged gzip file after row \d\d\d"):
        list(rows)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who reads everything
    assert "Permission denied" in sentence(path)


# Lines that are not rows.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "not valid JSON (Expecting value"),
        (b"[1, 2]", "not an object of fields but list"),
        (b"null", "not an object of fields but null"),
        (b'"text"', "not an object of fields but str"),
        (b"[" * 100_000, "not valid JSON (nested too deeply"),
        (b'{"a":' * 100_000, "not valid JSON (nested too deeply"),
        (b"1" * 5000, "not valid JSON (Exceeds the limit"),
        (b'{"a": 1} {"b": 2}', "not valid JSON (Extra data"),
        (b'{"a": "\0"}', "not valid JSON (Invalid control character"),
        (b'{"a": "\xe9"}', "not UTF-8 text ('utf-8' codec can't decode byte 0xe9"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "an object has the key 'c' twice"),
        (b'{"a": 1, " a": 2}', "the keys 'a', ' a' differ in white space alone"),
        (b'{"a": "' + b"x" * 3_000_000 + b'"}', "a line of more than 1 MiB"),
    ],
)
def test_one_bad_line_among_good_ones(
    line: bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neftune_dist.data.text_files.LONGEST_ROW_BYTES", 2**20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(ROWS[:1]) + line + b"\n" + lines(ROWS[1:]))
    (_, first), (place, bad), *rest = read(path)
    assert first == ROWS[0] and rest == [("row 3", ROWS[1]), ("row 4", ROWS[2])]
    assert place == "row 2" and isinstance(bad, BadRow) and reason in str(bad)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a", "1 values under a header of 2"),
        (b"a,b,c", "3 values under a header of 2"),
        (b'"a"b,c', "not valid CSV (',' expected after '\"')"),
    ],
)
def test_one_bad_line_of_a_table(line: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\n"a\nb",c\n' + line + b"\nd,e\n")
    (_, first), (place, bad), (last_place, last) = read(path)
    assert first == {"prompt": "a\nb", "completion": "c"}
    assert (last_place, last) == ("row 5", {"prompt": "d", "completion": "e"})
    assert place == "row 4" and isinstance(bad, BadRow) and reason in str(bad)


def test_one_bad_element_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([ROWS[0], None, 5, ROWS[1]])[:-1] + ', {"b": {"a": 1, "a": 1}}]')
    kinds = [(place, isinstance(row, BadRow)) for place, row in read(path)]
    assert kinds == [(f"row {i + 1}", bad) for i, bad in enumerate((0, 1, 1, 0, 1))]


# Rows that cannot be used.


def calling(*calls: Any, content: Any = None, **more: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    return {"messages": [{"role": "user", "content": "a"}, turn], **more}


def function(name: Any, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


MESSAGES = (("user", "a"), ("assistant", "b"))


def answer(**fields: Any) -> dict[str, Any]:
    turn = {"role": "assistant", "content": "b", **fields}
    return {"messages": [{"role": "user", "content": "a"}, turn]}


ASKED = ("human", "a")
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    # Fields that would be left out.
    (
        {"instruction": "a", "output": "b", "rationale": "r", "style": "x"},
        "fields 'rationale, style' would not be trained on: data.columns uses a field, "
        "data.ignore_fields=rationale,style leaves it out",
    ),
    (turns(*MESSAGES, prompt="another"), "field 'prompt' would not be trained on"),
    ({"prompt": "a", "completion": "b", "input": "c"}, "field 'input' would not be trained on"),
    ({"instruction": "a", "output": "b", "text": "else"}, "field 'text' would not be trained on"),
    ({"instruction": "a", "output": "b", "is_bad": True}, "field 'is_bad' would not be trained on"),
    ({"text": "a", "role": "prompter"}, "field 'role' would not be trained on"),
    ({"prompt": "a", "completion": "b", "label": False}, "field 'label' marks answers as good or"),
    ({"text": "a", "label": 0}, "field 'label' marks answers as good or bad (KTO)"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "field 'chosen' is one of two answers to c"),
    ({"prompt": "a", "completion": "b", "image": "x.jpg"}, "field 'image' is what a text model"),
    ({"prompt": "a", "completion": "b", "video_urls": ["x"]}, "field 'video_urls' is what a text"),
    (said(("human", "<image>\nWhat?"), ("gpt", "b")), "turn 1: <image> stands for what a text mod"),
    ({"instruction": "See. <audio>", "output": "b"}, "<audio> stands for what a text model cannot"),
    (
        {"instruction": "a", "input": "b", "context": "c", "output": "d"},
        "fields input and context both say what the instruction is about",
    ),
    (
        {"prompt": "a", "completion": "b", "system": "s", "system_prompt": "t"},
        "fields system and system_prompt hold different system prompts",
    ),
    (answer(annotations=[{"url": "x"}]), "turn 2: field 'annotations' would not be trained on"),
    (answer(**{"content ": "c"}), "turn 2: the keys 'content', 'content ' differ in white space a"),
    (turns(*MESSAGES, file_name="a.PNG"), "field 'file_name' is 'a.PNG', which a text model can"),
    (turns(*MESSAGES, urls=["b/a.webp"]), "field 'urls' is 'b/a.webp', which a text model can"),
    (said(("human", "In <image>, what?"), ("gpt", "b")), "turn 1: <image> stands for what a text"),
    (said(("human", "Is <|image_1|> big?"), ("gpt", "b")), "turn 1: <|image_1|> stands for what"),
    (said(("human", "[IMG] What?"), ("gpt", "b")), "turn 1: [IMG] stands for what a text model"),
    (said(("human", "<img>a.x</img>What?"), ("gpt", "b")), "turn 1: <img> stands for what a text"),
    (turns(*MESSAGES, split="Test"), "field 'split' says that the row is of the split 'Test': put"),
    (turns(*MESSAGES, kto_tag=True), "field 'kto_tag' marks answers as good or bad (KTO)"),
    (turns(*MESSAGES, is_good=0), "field 'is_good' would not be trained on"),
    (turns(*MESSAGES, source="A text. " * 50), "field 'source' would not be trained on"),
    ({"question": "2", "answer": "4", "how": "2 + 2 = 4"}, "field 'how' would not be trained on"),
    (turns(*MESSAGES, sources=[{"text": "A text. " * 50}]), "field 'sources' would not be trai"),
    (turns(*MESSAGES, target_language="French"), "field 'target_language' would not be trained on"),
    (turns(*MESSAGES, custom_instruction="Be brief"), "field 'custom_instruction' would not be t"),
    (turns(*MESSAGES, custom_instruction={"about": "me"}), "field 'custom_instruction' would not"),
    (
        {"task": "Say it in French.", "input": "a", "output": "b"},
        "field 'task' is a sentence, and would not be trained on: data.columns={instruction: task}",
    ),
    (answer(name="Ann"), "turn 2: field 'name' would not be trained on"),
    # Learning marks.
    *(
        (answer(**{name: 0}), f"turn 2: field '{name}' may say whether an answer is supervised")
        for name in ("calculate_loss", "lossMask", "loss_scale", "sample_weight", "token_weights")
    ),
    (answer(train=True, masked=True), "turn 2: fields masked, train contradict each other"),
    (answer(weight=0.5), "turn 2: field 'weight' is 0.5, neither 0 nor 1"),
    (answer(loss_mask=[0, 1]), "turn 2: field 'loss_mask' is [0, 1], neither 0 nor 1"),
    (
        answer(mask=1),
        "turn 2: field 'mask' may say whether an answer is supervised: call it loss_m",
    ),
    (
        answer(compute_loss=0),
        "turn 2: field 'compute_loss' may say whether an answer is supervised",
    ),
    (answer(role="user", trainable=1), "turn 2: a turn of the user is marked as trained on"),
    (answer(train="False"), "every answer is marked as not to be trained on"),
    (turns(*MESSAGES, loss=0), "the row is marked as not to be trained on"),
    # Thoughts.
    (answer(reasoning="a", thinking="b"), "fields reasoning and thinking hold different thoughts"),
    (answer(reasoning_details="so"), "field 'reasoning_details' is not a list of objects with a"),
    (answer(reasoning_details=[{"data": "x"}]), "turn 2: field 'text' is missing"),
    (
        {"prompt": "a", "completion": "b", "reasoning": "On"},
        "field 'reasoning' is 'On', a switch for reasoning and not a thought: data.ignore_fi",
    ),
    (
        answer(role="user", thought="hm"),
        "turn 2: a turn of the user is marked as trained on, or has",
    ),
    ({"chosen": "a", "rejected": "b"}, "(DPO): give the better one as 'completion', and its que"),
    (
        {
            "prompt": turns(("user", "a"), *MESSAGES[1:], ("user", "c"))["messages"],
            "chosen": [{"role": "assistant", "content": "d"}],
        },
        "(DPO): give the better one as 'completion', and its question as 'prompt'",
    ),
    ({"prompt": "a", "rejected": "b"}, "(DPO): give the better one as 'completion', and its que"),
    ({"input_ids": [1, 2], "labels": [-100, 2]}, "the row holds tokens (input_ids): give the te"),
    (
        {"prompt": "a", "response_a": "b", "response_b": "c", "winner": "b"},
        "field 'response_a' is one of two answers to compare (DPO): give the better one as 'com",
    ),
    (
        {"conversations": [{"from": "human", "text": "a"}]},
        "turn 1: field 'content' is missing; the",
    ),
    # Unknown formats.
    ({"frage": "a", "antwort": "b"}, "set data.columns={prompt: frage, completion: antwort}"),
    (
        {"id": "x", "reply": "b", "q": "a", "hint": "h"},
        "set data.columns={prompt: q, completion: reply} data.ignore_fields=hint",
    ),
    (
        {"question": "a", "context": "c", "answers": {"text": ["b"], "start": [1]}, "id": "x"},
        "set data.columns={instruction: question, output: answers.text.0}",
    ),
    ({"query": "a", "answers": "b", "tools": "[]"}, "{prompt: query, completion: answers}"),
    ({"data": ["a", "b", "c", "d"]}, "to read them so, set data.columns={conversations: data}"),
    ({"talk": turns(*MESSAGES)["messages"]}, "to read them so, set data.columns={messages: talk}"),
    ({"prompt": "a", "answers": ["b", "c"]}, "{prompt: prompt, completion: answers.0}"),
    ({"Q": "a", "CoT": "b", "A": "c"}, "{prompt: Q, completion: A, reasoning: CoT}"),
    ({"0": "a", "no": "b"}, "set data.columns={prompt: '0', completion: 'no'}"),
    # Of no form of turns that is read: no mapping is suggested that would be refused in its turn.
    ({"data": [{"t": "a"}, {"t": "b"}]}, "the fields data are of no known format (messages;"),
    # Objects around rows, which are no rows and no conversation.
    ({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, "'data' is a list of rows (2), and"),
    (
        {"data": [turns(("user", "a"), ("assistant", "b"))]},
        "'data' is a list of rows (1), and this",
    ),
    ({"type": "t", "all": [{"input": "a", "output": "b"}] * 2}, "'all' is a list of rows (2), and"),
    ({"0": {"prompt": "a", "completion": "b"}, "1": {"text": "c"}}, "an object of rows under name"),
    ({"INSTRUCTION": "a", "Input": "", "OUTPUT": "b"}, "output: OUTPUT, input: Input}"),
    ({"q": {"text": "a"}, "a": [{"text": "b"}]}, "{prompt: q.text, completion: a.0.text}"),
    ({"instruction\u200b": "a", "output": 1}, r"the fields instruction\u200b, output are of no kn"),
    ({}, "the fields (none) are of no known format (messages; conversations; instruction, out"),
    (
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "turn 1: field 'role' is missing; 'from' and 'value' are read from a field 'conversations'",
    ),
    ({"Question": "a", "Answer": "b"}, "the fields Question, Answer are of no known format"),
    ({"instruction": "a"}, "the fields instruction are of no known format"),
    ({"\ud800": 1}, r"the fields \ud800 are of no known format"),
    ({f"field {i}": 1 for i in range(1000)}, "[...] are of no known format"),
    # Texts.
    ({"instruction": 5, "output": "b"}, "field 'instruction' is not text but int"),
    ({"instruction": "a", "output": None}, "field 'output' is not text but null"),
    ({"instruction": "a", "output": ["b"]}, "field 'output' is not text but list"),
    ({"instruction": "a", "input": 7, "output": "b"}, "field 'input' is not text but int"),
    ({"instruction": "a", "output": ""}, "the answer is empty"),
    ({"instruction": "a", "output": " \n"}, "the answer is empty"),
    ({"instruction": "", "input": " ", "output": "b"}, "the instruction is empty"),
    ({"instruction": "a", "output": "b", "system": 1}, "field 'system' is not text but int"),
    ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "'history' holds turns"),
    ({"instruction": "a", "response": 1.5}, "field 'response' is not text but float"),
    ({"instruction": "a", "context": {}, "response": "b"}, "'context' is not text but dict"),
    ({"prompt": " ", "completion": "b"}, "the prompt is empty"),
    ({"prompt": "a", "completion": "\t"}, "the answer is empty"),
    ({"prompt": b"a", "completion": "b"}, "field 'prompt' is not text but bytes"),
    ({"text": " \n"}, "the text is empty"),
    ({"text": None}, "field 'text' is not text but null"),
    ({"instruction": "\ud800", "output": "b"}, "field 'instruction' holds a lone surrogate"),
    ({"prompt": "a", "completion": "\udfff"}, "field 'completion' holds a lone surrogate"),
    ({"text": "a\0b"}, "field 'text' holds a control character, U+0000, at character 2"),
    ({"text": "\x1b[31mred"}, "holds a control character, U+001B, at character 1"),
    ({"text": "x" * 10_000_000}, "10000000 characters are more than the 4194304 of a document"),
    # Messages.
    ({"messages": None}, "field 'messages' is not a list of turns but null"),
    ({"messages": []}, "field 'messages' is not a list of turns but an empty list"),
    ({"messages": "hello"}, "field 'messages' is not a list of turns but str"),
    ({"messages": ["hello"]}, "turn 1: not an object with 'role' and 'content' but str"),
    ({"messages": [{"role": "user"}]}, "turn 1: field 'content' is missing"),
    ({"messages": [{"content": "a"}]}, "turn 1: field 'role' is missing"),
    (turns(("user", "a"), ("assistant", None)), "turn 2: field 'content' is not text but null"),
    (turns(("user", "a"), ("bot", "b")), "turn 2: the role 'bot' is not known; known: system, us"),
    (turns(("user", "a"), ("function", "b")), "turn 2: the role 'function' is not known"),
    (turns(("User", "a"), ("assistant", "b")), "turn 1: the role 'User' is not known"),
    (turns(("user", "a"), (["assistant"], "b")), "turn 2: field 'role' is not text but list"),
    (turns(("user", "a"), ("user", "b")), "no turn is the assistant's"),
    (turns(("user", "a"), ("assistant", " ")), "turn 2: the answer is empty"),
    (turns(("user", ""), ("assistant", "b")), "turn 1: the content is empty"),
    (turns(("assistant", "a"), ("user", "b")), "the first turn is the assistant's"),
    (turns(("user", "a"), ("assistant", "\udc80")), "turn 2: field 'content' holds a lone surr"),
    (turns(("user", "a\b"), ("assistant", "b")), "turn 1: field 'content' holds a control char"),
    (
        turns(("user", [{"type": "image_url", "image_url": {}}]), ("assistant", "b")),
        "turn 1: part 1 of the content is 'image_url', not text",
    ),
    (turns(("user", [{"type": "text"}]), ("assistant", "b")), "turn 1: field 'text' is missing"),
    (turns(("user", ["a"]), ("assistant", "b")), "turn 1: part 1 of the content is 'str', not te"),
    (turns(("system", "s"), ("user", "a"), ("assistant", "b"), system="t"), "a system turn as wel"),
    (answer(function_call={"name": "f"}), "turn 2: field 'function_call' would not be trained on"),
    (answer(reasoning_content=5), "turn 2: field 'reasoning_content' is not text but int"),
    (answer(weight=0), "every answer is marked as not to be trained on"),
    # Tools.
    (
        calling({**function("f", {}), "thought": "hm"}),
        "turn 2: field 'thought' would not be trained on",
    ),
    (
        calling({"name": "f", "parameters": {"x": 1}}),
        "turn 2: field 'parameters' would not be trained on",
    ),
    (calling("f"), "turn 2: call 1 is not an object with the 'name' of a function"),
    (
        calling(function("f", '{"x": 1e400}')),
        "field 'tool_calls' cannot be written as JSON (Out of",
    ),
    (calling(function("f", {"x": math.nan})), "field 'tool_calls' cannot be written as JSON"),
    (calling(function("f", "{")), "turn 2: field 'arguments' is not valid JSON"),
    (
        calling(function("f", {}), function("g", [1])),
        "turn 2: the arguments of 'g' are not an object b",
    ),
    (calling(function("f", {"x": "\ud800"})), "turn 2: field 'tool_calls' holds a lone surrogate"),
    (calling(function("f", {"x": b"x"})), "turn 2: field 'tool_calls' cannot be written as JSON"),
    (calling(function("f", {}), tools="["), "field 'tools' is not valid JSON"),
    (calling(function("f", {}), tools={"f": 1}), "field 'tools' is not a list of functions but di"),
    (calling(function("f", {}), tools=[{"type": "function"}]), "tool 1 is not an object with the"),
    (answer(role="user", tool_calls=[1]), "turn 2: field 'tool_calls' in a turn of the user"),
    (answer(tool_calls="f()"), "turn 2: field 'tool_calls' is not a list but str"),
    # ShareGPT's.
    ({"conversations": {}}, "field 'conversations' is not a list of turns but dict"),
    (said(ASKED, ("gpt", 5)), "turn 2: field 'value' is not text but int"),
    (said(ASKED, ("alien", "b")), "turn 2: the role 'alien' is not known; known: system, user"),
    (said(ASKED, ("gpt", "")), "turn 2: the answer is empty"),
    (said(("gpt", "b"), ("gpt", "c")), "no turn is the user's"),
    (said(ASKED), "no turn is the assistant's"),
    (said(ASKED, ASKED, ("gpt", "b")), "turn 2 is the user's and cannot follow one of the user"),
    (said(ASKED, ("gpt", "b"), ("gpt", "c")), "turn 3 is the assistant's and cannot follow one of"),
    (said(ASKED, ("system", "s"), ("gpt", "b")), "turn 2 is the system's and cannot follow"),
    (said(("tool", "7"), ASKED, ("gpt", "b")), "turn 1 is the tool's, before the user has spoken"),
    (said(ASKED, ("function_call", "f()")), "turn 2: field 'value' is not valid JSON"),
    (
        said(ASKED, ("function_call", '{"name": "f"}')),
        "turn 2: the arguments of 'f' are not an object",
    ),
    (
        said(ASKED, ("function_call", '{"name": "f", "arguments": {}}'), ("gpt", "b")),
        "turn 3 is the assistant's and cannot follow one of the assistant",
    ),
    # TRL's lists.
    (
        {
            "prompt": turns(("user", "a"))["messages"],
            "completion": turns(("assistant", "b"))["messages"],
            "reasoning": "r",
        },
        "field 'reasoning' stands beside lists of turns, and would not be trained on",
    ),
    (
        {"prompt": [{"role": "user", "content": "a"}], "completion": "b"},
        "field 'completion' is not a list of turns but str",
    ),
    (
        {
            "prompt": turns(("user", "a"), ("assistant", "b"), ("user", "c"))["messages"],
            "completion": turns(("assistant", "d"))["messages"],
        },
        "turn 2 of 'prompt' is an answer, which would be trained on with the completion",
    ),
    (
        {
            "prompt": turns(("user", "a"))["messages"],
            "completion": turns(("user", "d"))["messages"],
        },
        "the completion begins with the role user, not assistant",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:50] for _, reason in BAD_ROWS])
def test_a_bad_row_says_what_is_wrong(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as raised:
        to_conversation(row, detect_format(row))
    assert reason in str(raised.value)
    assert len(str(raised.value).encode()) < 300  # can be printed, whatever the row held


@pytest.mark.parametrize(
    ("row", "format_name", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "alpaca", "of the format prompt_completion"),
        ({"instruction": "a"}, "alpaca", "field 'output' is missing$"),
        ({"instruction": "a", "output": "b"}, "dolly", "'response' is missing: .* format alpaca"),
        ({"instruction": "a", "output": "b"}, "messages", "'messages' is missing"),
        ({"body": "a"}, "text", "field 'text' is missing$"),
    ],
)
def test_a_row_of_another_format(row: dict[str, Any], format_name: str, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        to_conversation(row, format_name)


# All of it together: named by file and row, counted, and refused above a limit.


def test_bad_rows_of_many_files_are_named_and_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines([GOOD] * 5 + [{"instruction": "x", "output": "\0"}]))
    (folder / "b.csv").write_bytes(b"instruction,output\nSay hello.,Hello.\nSay.\n")
    (folder / "c.json").write_bytes(array([GOOD, {"text": "of another format"}]))
    config = DataConfig(source=str(folder), max_bad_fraction=0.4, cache_dir=str(tmp_path / "cache"))
    report = prepare(config, tiny_tokenizer).report
    assert report.sources[0].bad_rows == [
        "a.jsonl, row 6: field 'output' holds a control character, U+0000, at character 1",
        "b.csv, row 3: 1 values under a header of 2",
        "c.json, row 2: field 'instruction' is missing: the row is of the format text",
    ]
    assert (report.num_rows, report.num_bad_rows, report.num_documents) == (10, 3, 7)
    assert f"data:   {folder}, {report.sources[0].bad_rows[1]}" in report.lines()
    config.max_bad_fraction = 0.2
    with pytest.raises(UserError, match=r"3 of 10 rows cannot be used.*; the first: a\.jsonl, row"):
        prepare(config, tiny_tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"question;answer\na;b\n", r"the header, is separated by ';'"),
        ("a.csv", b"Say hello.,,Hello.\nSay.,,No.\n", r"its first line, the header, has a column"),
        ("a.csv", b"Say hello.,Hello.\nSay.,No.\n", r"row 2: the fields Say hello., Hello. are of"),
        ("a.tsv", b"prompt,completion\na,b\n", r"the header, is separated by ','"),
        ("a.csv", b"prompt,completion\n", r"a\.csv is empty"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.jsonl", '{"a": "é"}\n'.encode("latin-1"), r"1 of 1 row .*row 1: not UTF-8 text"),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz is empty"),
    ],
)
def test_a_file_of_no_good_row_is_refused(
    name: str, content: bytes, reason: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    config = DataConfig(source=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=reason):
        prepare(config, tiny_tokenizer)


def test_a_small_source_in_a_mixture_may_not_be_all_bad(
    write: Callable[..., DataConfig], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    good, bad = (write(rows, f"{i}.jsonl") for i, rows in enumerate(([GOOD] * 900, [{"a": 1}])))
    mixture = [SourceConfig(good.source), SourceConfig(bad.source)]
    config = DataConfig(mixture=mixture, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"data\.mixture\[1\]\.source=.*1 of 1 row cannot be used"):
        prepare(config, tiny_tokenizer)


def test_a_source_without_documents_counts_its_own_rows(
    write: Callable[..., DataConfig], tmp_path: Path, tiny_tokenizer: Any
) -> None:
    long = {"instruction": "Count.", "output": "1 " * 400}
    one, two = write([GOOD] * 3 + [long], "1.jsonl"), write([long] * 2, "2.jsonl")
    config = DataConfig(
        mixture=[SourceConfig(one.source), SourceConfig(two.source)],
        max_length=200,
        too_long="drop",
        cache_dir=str(tmp_path / "cache"),
    )
    with pytest.raises(
        UserError, match=r"mixture\[1\].* of 2 rows, 0 .*, 2 are over data\.max_len"
    ):
        prepare(config, tiny_tokenizer)


def test_a_row_that_nests_too_deeply_is_a_bad_row(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """One that Python's reader of JSON takes, where a field is looked into."""
    nested: Any = "x"
    for _ in range(900):
        nested = [nested]
    rows = [GOOD] * 4 + [{**GOOD, "meta": nested}, {"of no": "format", "a": nested}]
    report = prepare(write(rows, max_bad_fraction=0.5), tiny_tokenizer).report
    assert report.sources[0].bad_rows == [
        f"row {i}: it nests lists and objects more than 100 levels deep" for i in (5, 6)
    ]
