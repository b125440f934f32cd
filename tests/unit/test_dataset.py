"""What becomes of rows: all accounted for, unusable data refused, prompts held out whole."""

from __future__ import annotations

import copy
import json
import random
import re
import time
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

from neftune_dist import cli
from neftune_dist.config import DataConfig, SourceConfig, TrainConfig, UserError, load_config
from neftune_dist.data import builtin, shards
from neftune_dist.data.conversation import Turn
from neftune_dist.data.dataset import prepare
from neftune_dist.data.documents import Documents
from neftune_dist.data.sampler import make_sampler
from neftune_dist.data.sources import open_source
from neftune_dist.data.split import sample_documents
from tests.support.corpora import entries, numbered, texts

GOOD = {"instruction": "Say hello.", "output": "Hello."}


# The report.


def test_every_row_is_accounted_for(write: Callable[..., DataConfig], tiny_tokenizer: Any) -> None:
    rows = [
        *numbered(20),
        {"instruction": "no answer", "output": ""},
        {"instruction": "no answer"},
        {"instruction": "Say.", "output": "long " * 200},
        {"instruction": "long " * 200, "output": "Nothing of this is reached."},
    ]
    config = write(rows, max_length=64, max_bad_fraction=0.1, num_held_out=5)
    report = prepare(config, tiny_tokenizer).report
    assert (report.num_rows, report.num_bad_rows, report.num_truncated) == (24, 2, 1)
    assert (report.num_nothing_to_learn, report.num_dropped_too_long) == (1, 0)
    assert (report.num_documents, report.num_held_out) == (16, 5)
    assert report.sources[0].bad_rows == [
        "row 21: the answer is empty",
        "row 22: field 'output' is missing",
    ]
    config.too_long = "drop"
    report = prepare(config, tiny_tokenizer).report
    assert (report.num_dropped_too_long, report.num_truncated) == (2, 0)
    assert (report.num_documents, report.num_held_out, report.num_nothing_to_learn) == (15, 5, 0)


def test_the_report_says_it_all(write: Callable[..., DataConfig], tiny_tokenizer: Any) -> None:
    rows = [*numbered(20), *[{"instruction": "bad"}] * 30, {**GOOD, "output": "long " * 200}]
    config = write(rows, max_length=64, max_bad_fraction=1.0)
    lines = prepare(config, tiny_tokenizer).report.lines()
    text = "\n".join(lines)
    assert "51 rows, 21 documents to train on, 0 held out" in text
    assert "end of turn supervised in 95.2% of documents" in text
    assert "1 document truncated to data.max_length" in text
    assert f"{config.source}, row 21: field 'output' is missing" in text
    assert "and 10 more" in text and text.count("is missing") == 20
    text.encode()


def test_the_counts_of_tokens_are_those_of_the_documents(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    made = prepare(write(numbered(50), max_length=40, num_held_out=7), tiny_tokenizer)
    documents = [made.train[i] for i in range(len(made.train))]
    assert made.report.num_tokens == sum(len(ids) for ids, _ in documents)
    assert made.report.num_supervised_tokens == sum(int(s.sum()) for _, s in documents)
    assert made.report.longest_tokens == max(len(ids) for ids, _ in documents) <= 40
    assert made.train.lengths.tolist() == [len(ids) for ids, _ in documents]
    assert made.train.num_supervised.tolist() == [int(s.sum()) for _, s in documents]
    assert len(made.held_out_conversations) == len(made.held_out) == 7


def test_truncated_documents_keep_their_beginning_and_lose_their_end(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    config = write([GOOD, {**GOOD, "output": "word " * 100}], max_length=48)
    whole = prepare(write([GOOD, {**GOOD, "output": "word " * 100}], "all.jsonl"), tiny_tokenizer)
    cut = prepare(config, tiny_tokenizer)
    assert cut.train.lengths.tolist() == [whole.train.lengths[0], 48]
    np.testing.assert_array_equal(cut.train[1][0], whole.train[1][0][:48])
    np.testing.assert_array_equal(cut.train[1][1], whole.train[1][1][:48])
    assert cut.report.audit.end_of_turn_learned == 0.5


def test_a_template_without_end_of_turn_shows_in_the_report(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    endless = copy.deepcopy(tiny_tokenizer)
    endless.chat_template = endless.chat_template.replace("{{ eos_token }}", "")
    report = prepare(write(numbered(5)), endless).report
    assert report.audit.end_of_turn_learned == 0.0
    assert any("end of turn supervised in 0.0% of documents" in line for line in report.lines())


# Columns under other names.


FRAGEN = [{"frage": f"q{i}", "antwort": f"a{i}", "hinweis": "h"} for i in range(4)]
COLUMNS = {"prompt": "frage", "completion": "antwort"}


def test_columns_are_read_under_other_names(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    nested = [{"data": [{"text": f"q{i}"}, {"text": f"a{i}"}], "id": i} for i in range(4)]
    plain = [{"prompt": f"q{i}", "completion": f"a{i}", "system": "s"} for i in range(4)]
    blank = [{**row, "system": None} for row in plain]
    system = {"constant": "s"}
    configs = [
        write(plain, "plain.jsonl"),
        write(blank, "blank.jsonl", columns={"system": system}),
        write(FRAGEN, columns={**COLUMNS, "system": system}, ignore_fields="hinweis"),
        write(
            nested,
            "nested.jsonl",
            columns={"prompt": "data.0.text", "completion": "data.-1.text", "system": system},
        ),
    ]
    contents = {prepare(config, tiny_tokenizer).content for config in configs}
    assert len(contents) == 1


def test_columns_of_a_mixture_and_of_its_held_out_source(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    asked, fragen = write(numbered(4), "a.jsonl"), write(FRAGEN, "b.jsonl")
    mixture = [SourceConfig(asked.source), SourceConfig(fragen.source, columns=COLUMNS)]
    config = replace(fragen, mixture=mixture, ignore_fields="hinweis")
    assert prepare(config, tiny_tokenizer).report.num_documents == 8
    config = replace(asked, held_out_source=fragen.source, ignore_fields="hinweis")
    config.held_out_columns = COLUMNS
    report = prepare(config, tiny_tokenizer).report
    assert (report.num_documents, report.num_held_out) == (4, 4)
    # data.columns is the held-out source's, too.
    config = replace(config, source=fragen.source, columns=COLUMNS, held_out_columns=None)
    with pytest.raises(UserError, match=r"held_out_source=.* leaves none of 4 documents"):
        prepare(config, tiny_tokenizer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {},
            r"set data\.columns=\{prompt: frage, completion: antwort\} data\.ignore_fields=hinweis",
        ),
        (
            {"columns": COLUMNS},
            r"field 'hinweis' would not be trained on.* data\.ignore_fields=hinweis",
        ),
        (
            {"columns": {**COLUMNS, "prompt": "fragen"}, "ignore_fields": "hinweis"},
            r"reads 'prompt' from 'fragen', which is missing; there are frage, antwort",
        ),
        (
            {"columns": {**COLUMNS, "prompt": "frage.0"}, "ignore_fields": "hinweis"},
            r"reads 'prompt' from 'frage\.0', which is missing",
        ),
        (
            {"columns": {**COLUMNS, "system": "rolle"}, "ignore_fields": "hinweis"},
            r"no row has 'rolle', which data\.columns names",
        ),
        (
            {"columns": COLUMNS, "ignore_fields": "hinweis,rolle"},
            r"data\.ignore_fields: no row has 'rolle'",
        ),
        (
            {"columns": {"completion": "antwort", "frage": {"constant": "x"}}},
            r"data\.columns gives 'frage', which the row has, too",
        ),
    ],
)
def test_columns_that_are_not_there_are_refused(
    settings: dict[str, Any], said: str, write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=said):
        prepare(write(FRAGEN, **settings), tiny_tokenizer)


def test_rows_of_two_formats_in_one_file(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns}, {"messages": None, "prompt": "q", "completion": "a"}] * 2
    report = prepare(write(rows), tiny_tokenizer).report
    assert (report.num_documents, report.num_duplicates) == (4, 3)
    assert report.sources[0].formats == {"messages": 2, "prompt_completion": 2}
    assert any("rows of several formats: 2 messages, 2 prompt_comp" in s for s in report.lines())


ANSWERS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
WORSE = [ANSWERS[0], {"role": "assistant", "content": "bad"}]
HINTED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # UltraFeedback, binarized; Intel's pairs; TRL's with prompts of turns; OpenAI's.
    ({"prompt": "q", "chosen": ANSWERS, "rejected": WORSE, "score_chosen": 8.5}, {}),
    ({"prompt": "q", "chosen": "a", "rejected": "bad"}, {}),
    ({"prompt": "q", "completion": "a", "rejected": "bad"}, {}),
    ({"prompt": ANSWERS[:1], "chosen": ANSWERS[1:], "rejected": WORSE[1:]}, {}),
    (
        {
            "input": {"messages": ANSWERS[:1]},
            "preferred_output": ANSWERS[1:],
            "non_preferred_output": WORSE[1:],
        },
        {},
    ),
    # Settings that are there already are a part of what is advised.
    ({"q": "q", "a": "a", "mood": "b", "why": "c"}, {"ignore_fields": "mood"}),
    ({"q": "q", "a": "a", "mood": "b"}, {"columns": {"prompt": "q", "completion": "a"}}),
    ({"frage": "q", "antwort": "a", "ton": "b"}, {"columns": {"prompt": "frage"}}),
    ({"frage": {"text": "q"}, "antwort": "a"}, {"columns": {"instruction": "frage"}}),
    ({"antwort": "a"}, {"columns": {"prompt": {"constant": "q, as: ever"}}}),
    ({"text": "q a", "who": "b"}, {"columns": {"system": "who"}}),
    ({"q": "q", "a": "a", "task": "Say it so.", "b": "c"}, {"ignore_fields": "b"}),
    ({"messages": ANSWERS, "问": "b"}, {}),
    ({"messages": ANSWERS, **{f"field_{i}": "b" for i in range(15)}}, {}),
    ({"system": "b", "chat": "q a"}, {}),
    ({"system_prompt": "b", "problem": "q", "solution": "a"}, {}),
    ({"prompt": "q", "completion": "a", "reasoning": "on"}, {}),
    ({"prompt": ANSWERS[:1], "completion": ANSWERS[1:], "reasoning": "off"}, {}),
    ({"messages": ANSWERS, "split": "test", "b": "c"}, {"ignore_fields": "b"}),
    ({"messages": [ANSWERS[0], {**ANSWERS[1], "weight": 0.5}]}, {}),
]


@pytest.mark.parametrize("key", ["data.source", "data.mixture[1].source"])
@pytest.mark.parametrize(("row", "settings"), HINTED)
def test_settings_that_a_refusal_advises_read_the_row(
    row: dict[str, Any],
    settings: dict[str, Any],
    key: str,
    write: Callable[..., DataConfig],
    tiny_tokenizer: Any,
    tmp_path: Path,
) -> None:
    """As they stand in the sentence, typed behind the file's. None is advised twice."""
    plain, config = write(numbered(2), "plain.jsonl"), write([row])
    source = {"source": config.source, "columns": settings.get("columns", {})}
    if "mixture" in key:
        source = {"mixture": [{"source": plain.source}, source]}
    ignored = {name: text for name, text in settings.items() if name == "ignore_fields"}
    stored = {"model": {"name_or_path": "m"}, "data": source | ignored}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(stored))
    words = [f"data.cache_dir={config.cache_dir}"]
    setting, seen = key.replace("source", "columns"), set[str]()
    while True:
        try:
            dataset = prepare(load_config(path, words).data, tiny_tokenizer)
            break
        except UserError as error:
            sentence = str(error)
        assert sentence not in seen, sentence
        seen.add(sentence)
        # YAML ends with its own brace; of two hints the first is taken.
        columns = re.search(rf"{re.escape(setting)}=(\{{.*?\}}+)(?=[ .])", sentence)
        leave_out = re.search(r"data\.ignore_fields=[^\s).]+", sentence)
        advised = [found[0] for found in (columns, leave_out) if found]
        assert advised, sentence
        words += advised
    assert seen
    learned = [
        tiny_tokenizer.decode(ids[mask.astype(bool)].tolist())
        for ids, mask in (dataset.train[i] for i in range(len(dataset.train)))
    ]
    text = tiny_tokenizer.decode(dataset.train[len(dataset.train) - 1][0].tolist())
    assert text.count("q") and learned[-1].endswith("a</s>") and "bad" not in learned[-1], text


def test_a_file_that_changes_while_it_is_read(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """The entry would have the name of other rows."""
    config = write(numbered(4))
    source, path = open_source(SourceConfig(config.source)), Path(config.source)
    path.write_text(path.read_text().replace("1, done", "7, done"))
    with pytest.raises(UserError, match=r"rows\.jsonl was changed while it was read"):
        list(source.rows)


def test_ignored_fields_of_turns_and_calls(
    write: Callable[..., DataConfig], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "mood": "ok"}]
    config = write([{"messages": turns, "mood": "bad"}], ignore_fields="mood")
    assert prepare(config, tiny_tokenizer).report.num_documents == 1
    table = datasets.Dataset.from_list([{"prompt": "q", "completion": "a", "mood": b"\xff" * 9}])
    table.to_parquet(tmp_path / "a.parquet")
    config = replace(config, source=str(tmp_path / "a.parquet"))
    assert prepare(config, tiny_tokenizer).report.num_documents == 1
    with pytest.raises(UserError, match="field 'mood' would not be trained on"):
        prepare(replace(config, ignore_fields=None), tiny_tokenizer)


# What is refused.


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ([], {}, r"rows\.jsonl is empty"),
        (
            [GOOD] * 98 + [{"instruction": "a"}, {**GOOD, "output": 5}],
            {},
            r"2 of 100 rows cannot be used, more than data\.max_bad_fraction=0\.01; the first: "
            r"row 99: field 'output' is missing",
        ),
        ([{"body": "a"}], {}, r"1 of 1 row cannot.*row 1: the fields body are of no known format"),
        (
            [{"body": "a"}],
            {"max_bad_fraction": 1.0},
            r"no document to train on: of 1 row, 1 cannot be used \(the first: row 1: the field",
        ),
        (
            [{"instruction": "long " * 200, "output": "x"}] * 3,
            {"max_length": 32, "num_held_out": 1},
            r"no document to train on: of 3 rows, 0.* 3 have no supervised token",
        ),
        (
            [{"instruction": "long " * 200, "output": "x"}] * 3,
            {"max_length": 32, "too_long": "drop"},
            r"no document to train on.* 3 are over data\.max_length=32",
        ),
        (numbered(5), {"num_held_out": 5}, r"data\.num_held_out=5 leaves none of 5 documents"),
        (numbered(5), {"num_held_out": 99}, r"data\.num_held_out=99 leaves none of 5"),
        ([GOOD] * 9, {"num_held_out": 1}, r"data\.num_held_out=1 leaves none of 9"),
    ],
)
def test_data_that_will_not_do(
    rows: list[Any],
    settings: dict[str, Any],
    said: str,
    write: Callable[..., DataConfig],
    tiny_tokenizer: Any,
) -> None:
    config = write(rows, **settings)
    with pytest.raises(UserError, match=said) as raised:
        prepare(config, tiny_tokenizer)
    assert config.source in str(raised.value) or "num_held_out" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert entries(config) == []


def test_cut_documents_above_a_share_are_refused(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    rows = [*numbered(6), *({**GOOD, "output": f"{i} " + "long " * 200} for i in range(4))]
    for too_long, reason in (("truncate", "num_truncated"), ("drop", "num_dropped_too_long")):
        config = write(rows, max_length=64, max_cut_fraction=0.4, too_long=too_long)
        report = prepare(config, tiny_tokenizer).report
        assert getattr(report, reason) == 4
        assert report.examples == {reason: [0, "row 7"]}
        assert [line for line in report.lines() if line.endswith("(the first: row 7)")]
        longest = report.sources[0].longest_tokens
        config.max_cut_fraction = 0.3  # of the same entry of the cache, and of another
        for config.max_length in (64, 65):
            with pytest.raises(UserError) as raised:
                prepare(config, tiny_tokenizer)
            assert (
                f"4 of 10 documents would be cut or lost by data.max_length={config.max_length}"
                in str(raised.value)
            )
            assert f"the longest has {longest} tokens" in str(raised.value)


def test_left_out_documents_are_named_by_reason(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    rows = [*numbered(10), *numbered(3), {**GOOD, "output": "Hi."}]
    held_out = write([{**GOOD, "output": "else"}], "held_out.jsonl")
    config = write(rows, held_out_source=held_out.source, duplicates="drop")
    report = prepare(config, tiny_tokenizer).report
    assert report.examples == {"num_duplicates": [0, "row 11"], "num_leaked": [0, "row 14"]}
    lines = report.lines()
    assert any(line.endswith(f"dropped (the first: {config.source}, row 11)") for line in lines)


def test_cached_report_names_the_files_of_today(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("a", "b"):
        row = json.dumps({**GOOD, "input": name})
        (folder / f"{name}.jsonl").write_text(row + '\n{"output": "x"}\n')
    (folder / "README.md").touch()
    settings = {"max_bad_fraction": 0.5, "cache_dir": str(tmp_path / "cache")}
    prepare(DataConfig(source=str(folder), **settings), tiny_tokenizer)
    (folder / "README.md").rename(folder / "LICENSE")
    folder = folder.rename(tmp_path / "moved")
    made = prepare(DataConfig(source=str(folder), **settings), tiny_tokenizer)
    assert made.report.sources[0].left_out == ["LICENSE"]
    assert made.report.sources[0].name == str(folder)
    (folder / "b.jsonl").rename(folder / "c.jsonl")
    made = prepare(DataConfig(source=str(folder), **settings), tiny_tokenizer)
    assert [row.partition(",")[0] for row in made.report.sources[0].bad_rows] == [
        "a.jsonl",
        "c.jsonl",
    ]
    assert made.train.origin(1) == (0, "c.jsonl, row 1")


@pytest.mark.parametrize("content", ["", "[]", "\n\n", "\ufeff"])
def test_an_empty_file(content: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content, encoding="utf-8")
    config = DataConfig(source=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"rows\.json is empty"):
        prepare(config, tiny_tokenizer)


def test_the_share_of_bad_rows_is_a_limit_and_no_content(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """A higher limit lets the same documents through, in the same order; a lower one refuses them
    also where the cache has them."""
    rows = [*numbered(20), {"instruction": "bad"}]
    one = prepare(write(rows, max_bad_fraction=0.05), tiny_tokenizer)
    two = prepare(write(rows, max_bad_fraction=0.5), tiny_tokenizer)
    assert one.fingerprint == two.fingerprint
    with pytest.raises(
        UserError, match=r"1 of 21 rows .*max_bad_fraction=0\.04; the first: row 21"
    ):
        prepare(write(rows, max_bad_fraction=0.04), tiny_tokenizer)


def test_a_row_that_cannot_be_printed_is_reported(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    rows = [{"\ud800": "x"}, *numbered(20), {"instruction": "\ud800", "output": "a"}]
    report = prepare(write(rows, max_bad_fraction=0.5), tiny_tokenizer).report
    assert report.num_bad_rows == 2
    "\n".join(report.lines()).encode()


# The held-out split.


def prompts(documents: Documents, tokenizer: Any) -> list[str]:
    return [text.split("<|assistant|>")[0] for text in texts(documents, tokenizer)]


def test_no_prompt_is_on_both_sides(write: Callable[..., DataConfig], tiny_tokenizer: Any) -> None:
    made = prepare(write(numbered(200, prompts=50), num_held_out=30), tiny_tokenizer)
    train, held_out = (
        prompts(documents, tiny_tokenizer) for documents in (made.train, made.held_out)
    )
    assert not {*train} & {*held_out}
    assert len(train) + len(held_out) == 200
    assert 30 <= len(held_out) < 34  # whole prompts of four answers each


def test_question_is_held_out_under_every_system_prompt(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    rows = [{**row, "system": said} for row in numbered(20) for said in ("", "s", "t")]
    made = prepare(write(rows, num_held_out=6), tiny_tokenizer)
    assert (made.report.num_held_out, made.report.num_documents) == (6, 54)
    held_out = [made.held_out_conversations[i] for i in range(6)]
    asked = {turn.content for made in held_out for turn in made.turns if turn.role == "user"}
    assert len(asked) == 2


def test_a_longer_conversation_is_held_out_with_its_opening(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """A held-out conversation must not be the beginning of one that is trained on."""
    rows = []
    for i in range(40):
        opening = [
            {"role": "user", "content": f"Number {i}?"},
            {"role": "assistant", "content": f"{i}."},
        ]
        more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
        rows += [{"messages": opening}, {"messages": opening + more}]
    made = prepare(write(rows, num_held_out=20), tiny_tokenizer)
    train = texts(made.train, tiny_tokenizer)
    for text in texts(made.held_out, tiny_tokenizer):
        assert not any(other.startswith(text) or text.startswith(other) for other in train)


def test_the_split_does_not_depend_on_the_order_of_rows(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    rows = numbered(120, prompts=60)
    sides = []
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        made = prepare(write(rows, f"{seed}.jsonl", num_held_out=25), tiny_tokenizer)
        sides.append(sorted(texts(made.held_out, tiny_tokenizer)))
    assert sides[0] == sides[1] == sides[2]


def test_more_held_out_keeps_those_held_out_before(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    few, many = (
        texts(prepare(write(numbered(99), num_held_out=n), tiny_tokenizer).held_out, tiny_tokenizer)
        for n in (10, 40)
    )
    assert {*few} < {*many}


def test_a_share_is_held_out_as_its_number_is(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    rows = [*numbered(200, prompts=100), {"instruction": "bad"}]
    one = prepare(write(rows, held_out_fraction=0.15), tiny_tokenizer)
    two = prepare(write(rows, num_held_out=30), tiny_tokenizer)
    assert (len(one.held_out), len(one.train)) == (30, 170)
    assert texts(one.held_out, tiny_tokenizer) == texts(two.held_out, tiny_tokenizer)
    few = prepare(write(numbered(9), held_out_fraction=0.01), tiny_tokenizer)
    assert len(few.held_out) == 1


def test_a_source_of_its_own_is_held_out_and_leaks_nothing(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Whatever the format, the case and the white space of the same question."""
    held_out = write(
        [
            {"messages": [*asked("Count  to 3.\n"), {"role": "assistant", "content": "Three."}]},
            {"messages": [*asked("COUNT TO 4. now"), {"role": "assistant", "content": "Four."}]},
            {"messages": [*asked("Something else."), {"role": "assistant", "content": "Else."}]},
            {"messages": asked("No answer.")},
        ],
        "held_out.jsonl",
    )
    rows = [
        *numbered(20, prompts=10),
        {"instruction": "Count to 4.", "input": "NOW", "output": "4"},
    ]
    config = write(rows, held_out_source=held_out.source, max_bad_fraction=0.3)
    made = prepare(config, tiny_tokenizer)
    report = made.report
    assert (report.num_leaked, report.num_documents, report.num_held_out) == (3, 18, 3)
    assert (report.num_rows, report.num_bad_rows) == (25, 1)
    assert not any(
        "Count to 3." in text or "NOW" in text for text in texts(made.train, tiny_tokenizer)
    )
    assert [conversation.turns[1].content for conversation in made.held_out_conversations] == [
        "Three.",
        "Four.",
        "Else.",
    ]
    lines = "\n".join(report.lines())
    assert "3 documents removed: the prompt is held out" in lines
    assert "held_out.jsonl: 4 rows, 3 documents, not trained on" in lines
    assert "held_out.jsonl, row 4: no turn is the assistant's" in lines
    Path(held_out.source).write_text(Path(held_out.source).read_text() + "\n")
    assert prepare(config, tiny_tokenizer).fingerprint != made.fingerprint
    assert prepare(config, tiny_tokenizer).identity["dataset"] != made.identity["dataset"]


def test_a_held_out_source_does_not_decide_the_order_of_training(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Law 4: what is evaluated never changes what is trained."""
    made = [
        prepare(
            write(
                numbered(20), held_out_source=write(held_out, f"{i}.jsonl").source if i else None
            ),
            tiny_tokenizer,
        )
        for i, held_out in enumerate(
            ([], [{"prompt": "Why?", "completion": "So."}], numbered(40)[20:])
        )
    ]
    assert len({dataset.fingerprint for dataset in made}) == 3
    assert [len(dataset.held_out) for dataset in made] == [0, 1, 20]
    orders = {
        tuple(make_sampler(TrainConfig(global_batch_size=20), 20, dataset.content).documents(0)[0])
        for dataset in made
    }
    assert len({dataset.content for dataset in made}) == len(orders) == 1


@pytest.mark.parametrize("fate", ["held out", "dropped", "not chosen"])
def test_rows_that_are_not_trained_on_do_not_decide_the_order(
    fate: str, write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Held out of the training data, dropped as copies, or not chosen by a weight: another answer,
    or one row less, leaves the order alone."""
    rows = numbered(40)
    if fate == "dropped":
        config, other = (
            write([*rows, rows[3]], duplicates="drop"),
            write(rows, "b.jsonl", duplicates="drop"),
        )
        assert prepare(config, tiny_tokenizer).report.num_dropped_duplicates == 1
    elif fate == "held out":
        config = write(rows, num_held_out=9)
        [_, answer] = prepare(config, tiny_tokenizer).held_out_conversations[4].turns
        changed = [
            {**row, "output": "?"} if row["output"] == answer.content else row for row in rows
        ]
        other = write(changed, "b.jsonl", num_held_out=9)
    else:
        config = mixed(write, {"max_documents": 60})
        kept = {*prompts(prepare(config, tiny_tokenizer).train, tiny_tokenizer)}
        path = Path(config.mixture[0].source)
        lines = path.read_text().splitlines(keepends=True)
        left_out = next(x for x in lines if not any(json.loads(x)["prompt"] in p for p in kept))
        other = mixed(write, {"max_documents": 60})
        other.mixture[0].source = str(path.with_name("other.jsonl"))
        Path(other.mixture[0].source).write_text("".join(x for x in lines if x != left_out))
    one, two = prepare(config, tiny_tokenizer), prepare(other, tiny_tokenizer)
    assert one.fingerprint != two.fingerprint
    assert texts(one.train, tiny_tokenizer) == texts(two.train, tiny_tokenizer)
    assert one.content == two.content


def test_tokens_masks_order_and_repetitions_decide_the_order(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    rows = numbered(12)
    made = [
        prepare(config, tiny_tokenizer).content
        for config in (
            write(rows),
            write(rows[::-1], "reversed.jsonl"),
            write([*rows[:-1], {**rows[-1], "output": "12, done."}], "other.jsonl"),
            write(rows, supervise="all"),
            write([*rows, rows[-1]], "copy.jsonl"),
            replace(write(rows), mixture=[SourceConfig(write(rows).source, weight=2.0)]),
        )
    ]
    assert len({*made}) == 6


def asked(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def test_a_held_out_source_that_holds_all_prompts(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    same = write(numbered(9), "same.jsonl")
    config = write(numbered(9), held_out_source=same.source)
    with pytest.raises(UserError, match=r"held_out_source=.*leaves none of 9 documents"):
        prepare(config, tiny_tokenizer)


def test_a_held_out_source_of_the_hub(
    write: Callable[..., DataConfig], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for = []

    def load_dataset(name: str, **which: Any) -> datasets.Dataset:
        asked_for.append((name, which))
        return datasets.Dataset.from_list(
            [{"messages": [*asked("Else?"), {"role": "assistant", "content": "Else."}]}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = write(
        numbered(9),
        held_out_source="org/name",
        held_out_split="test_sft",
        held_out_revision="v1",
    )
    made = prepare(config, tiny_tokenizer)
    assert asked_for == [("org/name", {"split": "test_sft", "revision": "v1"})]
    assert (made.report.num_documents, made.report.num_held_out) == (9, 1)
    assert "org/name[test_sft]: 1 row, 1 document, not trained" in "\n".join(made.report.lines())


def test_held_out_conversations_are_those_of_the_documents(
    write: Callable[..., DataConfig], smollm2: Any
) -> None:
    rows = builtin.rows()[:300]
    made = prepare(write(rows, num_held_out=60), smollm2)
    answers = {(row["instruction"], row["input"]): row for row in rows}
    for i, spoken in enumerate(made.held_out_conversations):
        row = answers[spoken.turns[0].content, spoken.context]
        assert spoken.turns[1] == Turn("assistant", row["output"])
        assert f"{row['output']}<|im_end|>" in smollm2.decode(made.held_out[i][0].tolist())


# Duplicates, plain texts, turns that are left out.


def test_duplicates_are_counted_and_dropped_where_asked(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """The same conversation, not the same row, and no more than alike is not the same."""
    again = [{**row, "id": 7} for row in numbered(4)] + [{**GOOD, "output": "hello."}, GOOD, GOOD]
    rows = [*numbered(10), *again]
    kept = prepare(write(rows), tiny_tokenizer).report
    assert (kept.num_duplicates, kept.num_dropped_duplicates, kept.num_documents) == (5, 0, 17)
    assert any("5 duplicates of a conversation kept" in line for line in kept.lines())
    made = prepare(write(rows, duplicates="drop"), tiny_tokenizer)
    assert (made.report.num_dropped_duplicates, made.report.num_documents) == (5, 12)
    assert len({*texts(made.train, tiny_tokenizer)}) == 12
    assert any("5 duplicates of a conversation dropped" in line for line in made.report.lines())


def test_a_plain_text_is_learned_whole(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Between the tokenizer's beginning and its end, without a template; but for the first
    token, which nothing predicts."""
    made = prepare(write([{"text": " Once\nupon. "}, {"text": "x"}]), tiny_tokenizer)
    ids, supervised = made.train[0]
    prefix = tiny_tokenizer("")["input_ids"]
    inside = tiny_tokenizer(" Once\nupon. ", add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [*prefix, *inside, tiny_tokenizer.eos_token_id]
    assert supervised.tolist() == [0] + [1] * (len(ids) - 1)
    assert made.report.num_plain_texts == 2 and made.report.audit.end_of_turn_learned == 1.0
    assert any(
        "2 documents of plain text, supervised whole" in line for line in made.report.lines()
    )


def test_turns_that_are_left_out_are_counted(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    spoken = [("gpt", "x"), ("human", "a"), ("gpt", "b"), ("human", "y")]
    rows = [{"conversations": [{"from": who, "value": what} for who, what in spoken]}] * 3
    report = prepare(write(rows), tiny_tokenizer).report
    assert report.num_turns_left_out == 6
    assert any("6 turns left out that nothing asks for or answers" in x for x in report.lines())


# Mixtures.


def mixed(write: Callable[..., DataConfig], *entries: dict[str, Any], **more: Any) -> DataConfig:
    """Of sources of 100, 200, ... rows whose prompts begin with the source's letter."""
    mixture = []
    for i, entry in enumerate(entries):
        letter = "ABC"[i]
        rows = [{"prompt": f"{letter} {n}?", "completion": f"{n}."} for n in range(100 * (i + 1))]
        source = write(rows, f"{letter}.jsonl").source
        mixture.append(SourceConfig(source, **entry))
    return DataConfig(mixture=mixture, cache_dir=write([]).cache_dir, **more)


def occurrences(documents: Documents, tokenizer: Any) -> dict[str, Counter[str]]:
    """How often each prompt is there, by the letter of its source."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for prompt in prompts(documents, tokenizer):
        question = prompt.split("\n")[1].split("<|")[0].removesuffix("</s>")
        found[question[0]][question] += 1
    return found


def test_a_weight_is_the_times_that_a_document_occurs(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    config = mixed(write, {"weight": 2.3}, {"weight": 0.25}, {})
    made = prepare(config, tiny_tokenizer)
    found = occurrences(made.train, tiny_tokenizer)
    assert {*found["A"].values()} == {2, 3} and len(found["A"]) == 100
    assert abs(found["A"].total() - 230) < 20  # 4.6 is the spread of the binomial
    assert {*found["B"].values()} == {1} and abs(found["B"].total() - 50) < 25
    assert {*found["C"].values()} == {1} and len(found["C"]) == 300
    report = made.report
    assert (
        report.num_documents
        == len(made.train)
        == sum(counted.total() for counted in found.values())
    )
    assert [source.num_documents for source in report.sources] == [100, 200, 300]
    assert [source.num_occurrences for source in report.sources] == [
        found[letter].total() for letter in "ABC"
    ]
    assert report.num_not_chosen == 200 - len(found["B"])
    assert report.num_tokens == int(made.train.lengths.sum())
    told = f"A.jsonl: 100 rows, 100 documents, {found['A'].total()} occurrences in an epoch"
    assert any(told in line for line in report.lines())
    with pytest.raises(UserError, match=r"mixture\[1\]\.weight=1e-06 leaves none of 200 documents"):
        prepare(mixed(write, {}, {"weight": 1e-6}, {}), tiny_tokenizer)
    # A repetition is a document of its own, of the same tokens.
    ids = [made.train[i][0].tolist() for i in range(len(made.train))]
    assert ids[0] == ids[1] and made.train.gather(np.array([0, 1]))[0].tolist() == ids[0] * 2


def test_a_cap_is_not_the_first_ones_and_grows_by_more(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    few, many = (
        occurrences(
            prepare(mixed(write, {"max_documents": number}), tiny_tokenizer).train, tiny_tokenizer
        )["A"]
        for number in (10, 40)
    )
    assert (len(few), len(many)) == (10, 40) and {*few} < {*many}
    assert {*few} != {f"A {n}?" for n in range(10)}
    half = prepare(mixed(write, {"max_documents": 40, "weight": 1.5}), tiny_tokenizer)
    found = occurrences(half.train, tiny_tokenizer)["A"]
    assert {*found} == {*many} and 45 < found.total() < 75  # the 0.5 is another choice than the cap


def test_a_mixture_holds_out_before_it_repeats(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    config = mixed(write, {"weight": 3.0}, {"max_documents": 50}, num_held_out=60)
    made = prepare(config, tiny_tokenizer)
    train, held_out = ({*prompts(part, tiny_tokenizer)} for part in (made.train, made.held_out))
    assert not train & held_out and len(held_out) == len(made.held_out) == 60
    assert (
        made.report.num_documents == 3 * (100 - sum(" A" in p or "\nA" in p for p in held_out)) + 50
    )


def test_a_sample_is_of_different_documents_of_all_sources(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    """Copies of a document, by a weight or in the rows, count once; more include those before."""
    config = mixed(write, {"weight": 3.0}, {}, {"weight": 0.5}, max_length=64)
    rows = [json.loads(x) for x in Path(config.mixture[1].source).read_text().splitlines()]
    copies = write([row for row in rows for _ in range(3)], "copies.jsonl").source
    config.mixture.append(SourceConfig(copies))
    train = prepare(config, tiny_tokenizer).train
    found = {number: sample_documents(train, number) for number in (50, 120, 10**6)}
    assert [len(chosen) for chosen in found.values()][:2] == [50, 120]
    assert {*found[50]} < {*found[120]} < {*found[10**6]}
    for indices in found.values():
        assert (np.diff(indices) > 0).all()
        counts = occurrences(_Part(train, indices), tiny_tokenizer)
        assert {times for of in counts.values() for times in of.values()} == {1}
    everything = occurrences(train, tiny_tokenizer)
    assert len(found[10**6]) == sum(map(len, everything.values()))
    for letter, of in occurrences(_Part(train, found[120]), tiny_tokenizer).items():
        expected = 120 * len(everything[letter]) / len(found[10**6])
        assert abs(len(of) - expected) < 4 * expected**0.5


class _Part(Documents):
    """Some of the documents."""

    def __init__(self, documents: Documents, indices: np.ndarray) -> None:
        self.documents, self.indices = documents, indices  # no files

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.documents[int(self.indices[i])]


@pytest.mark.parametrize("change", [{"weight": 2.0}, {"max_documents": 99}, {"format": "text"}])
def test_what_is_mixed_is_in_the_fingerprint(
    change: dict[str, Any], write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    base = prepare(mixed(write, {}, {}), tiny_tokenizer)
    again = prepare(mixed(write, {}, {}), tiny_tokenizer)
    assert (base.fingerprint, base.identity) == (again.fingerprint, again.identity)
    if "format" in change:
        with pytest.raises(UserError, match="field 'text' is missing"):
            prepare(mixed(write, change, {}), tiny_tokenizer)
        return
    other = prepare(mixed(write, change, {}), tiny_tokenizer)
    assert other.fingerprint != base.fingerprint
    assert other.identity["dataset"] != base.identity["dataset"]


# More rows than memory holds.


def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for digests and the like. Python's memory and numpy's; the tokenizer's own is that of a
    batch."""
    monkeypatch.setattr(shards, "_SHARD_ROWS", 50)
    peaks = []
    for number in (100, 200, 1_000):  # the first fills what is made once
        path = tmp_path / f"{number}.jsonl"
        with path.open("w") as file:
            for i in range(number):
                row = {"instruction": f"Count to {i}.", "output": f"{i}, " * 20}
                file.write(json.dumps(row) + "\n")
        config = DataConfig(
            source=str(path),
            template="alpaca",
            num_held_out=number // 10,
            cache_dir=str(tmp_path),
        )
        tracemalloc.start()
        made = prepare(config, tiny_tokenizer)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(made.train) + len(made.held_out) == number
    per_row = (peaks[2] - peaks[1]) / 800
    assert per_row < 250, peaks  # bytes; a row's tokens and mask take about 600


# Real data, and the command line.


def test_alpaca_in_seconds(real_alpaca: Path, smollm2: Any, tmp_path: Path) -> None:
    started = time.process_time()
    made = prepare(DataConfig(source=str(real_alpaca), cache_dir=str(tmp_path)), smollm2)
    seconds = time.process_time() - started
    report = made.report
    assert report.num_rows == 15_130 and report.num_bad_rows == 9
    assert report.num_documents + report.num_nothing_to_learn == 15_121
    assert all(": the answer is empty" in row for row in report.sources[0].bad_rows)
    assert report.audit.end_of_turn_learned == 1 - report.num_truncated / report.num_documents
    assert seconds < 30  # about 6 of one core


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.source=/nowhere/rows.jsonl"], "data.source=/nowhere/rows.jsonl does not exist"),
        (["data.source=no-one/no-data"], "could not be loaded from the hub"),
        (["data.num_held_out=50"], "data.num_held_out=50 leaves none"),
        (["data.max_lenght=5"], "unknown key data.max_lenght; did you mean data.max_length?"),
    ],
)
def test_the_command_line_says_one_sentence_and_exits_with_2(
    settings: list[str],
    said: str,
    tmp_path: Path,
    smollm2_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows, config = tmp_path / "rows.json", tmp_path / "config.yaml"
    rows.write_text(json.dumps(numbered(9)))
    config.write_text(f"model: {{name_or_path: {smollm2_folder}}}\n")
    words = ["prepare", str(config), f"data.cache_dir={tmp_path}", f"data.source={rows}", *settings]
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert said in told and told.count("\n") == 1 and "Traceback" not in told, told


def test_open_documents_hold_no_column_in_memory(tmp_path: Path) -> None:
    """Memory of a rank does not grow with the number of documents."""
    number = 200_000
    np.zeros(number, np.int32).tofile(tmp_path / "input_ids.bin")
    np.zeros(number, np.uint8).tofile(tmp_path / "supervised.bin")
    index = np.ones((5, number), np.int64)
    index[0] = np.arange(number)
    np.save(tmp_path / "train.npy", index)
    tracemalloc.start()
    documents = Documents(tmp_path, "train")
    ids, _ = documents.gather(np.array([5, number - 1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(documents) == number and len(ids) == 2
    assert peak < index.nbytes / 6
