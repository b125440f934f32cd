"""Rows as people have them, with the text and the learned part of it that each must give.

The files stand for kinds, of which the tests of sources and formats have small ones of their own.
What is expected is written out here, and comes from no part of the package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neftune_dist.config import DataConfig, UserError
from neftune_dist.data.dataset import Dataset, prepare
from tests.support.shared_data import shared

_Prepared = tuple[Dataset, list[tuple[str, str]]]


def made(name: str, tokenizer: Any, tmp_path: Path, **settings: Any) -> _Prepared:
    """The documents of a file: the text of each, and of its learned tokens."""
    path = str(shared(f"cases/rows/{name}"))
    found = prepare(DataConfig(source=path, cache_dir=str(tmp_path), **settings), tokenizer)
    documents = [found.train[i] for i in range(len(found.train))]
    return found, [
        (tokenizer.decode(ids.tolist()), tokenizer.decode(ids[mask.astype(bool)].tolist()))
        for ids, mask in documents
    ]


def expected(*turns: str) -> tuple[str, str]:
    """A conversation of questions and answers under the tests' template; all answers learned."""
    text = learned = ""
    for asked, said in zip(turns[::2], turns[1::2], strict=True):
        text += f"<|user|>\n{asked}<|assistant|>\n{said}</s>"
        learned += f"{said}</s>"
    return text, learned


def refused(name: str, tokenizer: Any, tmp_path: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        made(name, tokenizer, tmp_path, **settings)
    return str(raised.value)


def test_01_turns_not_to_learn(tiny_tokenizer: Any, tmp_path: Path) -> None:
    _, found = made("01_turns_not_to_learn.jsonl", tiny_tokenizer, tmp_path)
    assert found == [
        (expected(f"Say {n}.", f"WRONG {n}", "No.", f"Right {n}")[0], f"Right {n}</s>")
        for n in ("one", "two", "three", "four", "five", "six")
    ]


CALL = '<call>{"name": "%s", "arguments": %s}</call>'


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_02_tools(kind: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = str(shared("cases/rows/02_tools.jinja"))
    rows = [
        ("Weather in Oslo?", "weather", {"city": "Oslo"}, {"city": "string"}),
        ("Add 1 and 2.", "add", {"a": 1, "b": 2}, {"a": "integer", "b": "integer"}),
    ]
    texts = []
    for asked, name, arguments, types in rows:
        parameters = {"type": "object", "properties": {k: {"type": t} for k, t in types.items()}}
        tool = {"type": "function", "function": {"name": name, "parameters": parameters}}
        call = f"{CALL % (name, json.dumps(arguments))}<|im_end|>"
        system = f"<|im_start|>system\n{json.dumps(tool)}\n<|im_end|>\n"
        user = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        texts.append((f"{system}{user}{call}\n", call))
    _, found = made(f"02_tools.{kind}", tiny_tokenizer, tmp_path, template=template)
    assert found == texts


def test_03_saved_dataset(tiny_tokenizer: Any, tmp_path: Path) -> None:
    dataset, found = made("03_saved_dataset", tiny_tokenizer, tmp_path)
    assert found == [expected(f"Say {i}", f"word{i}") for i in range(4)]
    assert "cache-abc123.arrow" in dataset.report.sources[0].left_out


@pytest.mark.parametrize(("split", "number"), [("train", 4), ("validation", 2), ("test", 2)])
def test_04_splits(split: str, number: int, tiny_tokenizer: Any, tmp_path: Path) -> None:
    dataset, found = made("04_splits", tiny_tokenizer, tmp_path, split=split)
    path = shared(f"cases/rows/04_splits/{split}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert found == [expected(row["instruction"], row["output"]) for row in rows]
    others = {"train.jsonl", "validation.jsonl", "test.jsonl"} - {path.name}
    assert {*dataset.report.sources[0].left_out} == others


@pytest.mark.parametrize("name", ["05_far_date", "05_date32"])
def test_05_dates_that_python_cannot_hold(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    assert made(f"{name}.parquet", tiny_tokenizer, tmp_path)[1] == [expected("a", "b")]


def test_06_two_columns_of_one_name(tiny_tokenizer: Any, tmp_path: Path) -> None:
    said = refused("06_two_columns_of_one_name.parquet", tiny_tokenizer, tmp_path)
    assert said.endswith("it has two columns of the name 'output'.")


def test_08_reasoning_fields(tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = str(shared("cases/rows/09_reasoning_from_a_field.jinja"))
    _, found = made("08_reasoning_fields.jsonl", tiny_tokenizer, tmp_path, template=template)
    rows = [("2+2?", "two and two make four", "4"), *[("2+3?", "hm", "5")] * 3]
    for (text, learned), (asked, thought, said) in zip(found, rows, strict=True):
        prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n<think>\n"
        answer = f"{thought}\n</think>\n\n{said}<|im_end|>"
        assert (text, learned) == (f"{prompt}{answer}\n", answer)
    said = refused("08_reasoning_fields.jsonl", tiny_tokenizer, tmp_path)
    assert "4 of 4 rows" in said and "reasoning" in said


def test_10_image(tiny_tokenizer: Any, tmp_path: Path) -> None:
    said = refused("10_image.jsonl", tiny_tokenizer, tmp_path)
    assert "row 1: turn 1: <image> stands for what a text model cannot see" in said


def test_11_undesirable(tiny_tokenizer: Any, tmp_path: Path) -> None:
    said = refused("11_undesirable.jsonl", tiny_tokenizer, tmp_path)
    assert "2 of 2 rows" in said and "row 1: field 'label' marks answers as good or bad" in said


def test_13_same_question_other_system(tiny_tokenizer: Any, tmp_path: Path) -> None:
    name = "13_same_question_other_system.jsonl"
    dataset, found = made(name, tiny_tokenizer, tmp_path, num_held_out=20)
    held_out = {
        turn.content
        for i in range(20)
        for turn in dataset.held_out_conversations[i].turns
        if turn.role == "user"
    }
    assert len(held_out) == 5 and len(found) == 180
    assert not [text for text, _ in found for asked in held_out if f"\n{asked}\n" in text]


def test_23_space_in_key(tiny_tokenizer: Any, tmp_path: Path) -> None:
    assert made("23_space_in_key.jsonl", tiny_tokenizer, tmp_path)[1] == [expected("a", "b")]


@pytest.mark.parametrize("name", ["24_json_feature.parquet", "24_json_feature"])
def test_24_json_feature(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    template = str(shared("cases/rows/02_tools.jinja"))
    _, found = made(name, tiny_tokenizer, tmp_path, template=template)
    properties = {"weather_of": {"city": "string"}, "add_up": {"a": "integer", "b": "integer"}}
    for (text, _), (tool, types) in zip(found, properties.items(), strict=True):
        listed = json.loads(text.splitlines()[1])["function"]
        assert listed["name"] == tool
        assert listed["parameters"]["properties"] == {k: {"type": t} for k, t in types.items()}


def test_28_two_formats(tiny_tokenizer: Any, tmp_path: Path) -> None:
    dataset, found = made("28_two_formats.parquet", tiny_tokenizer, tmp_path)
    assert found == [expected("x", "y")] * 3 + [expected("a", "b")] * 3
    assert dataset.report.num_bad_rows == 0
