"""What becomes of rows: all accounted for, unusable data refused, prompts held out whole."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neftune_dist import cli
from neftune_dist.config import DataConfig, UserError
from neftune_dist.data import builtin
from neftune_dist.data.corpus import Documents, prepare
from neftune_dist.data.formats import Turn
from tests.unit.corpora import entries, numbered, texts

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
    assert report.bad_rows == [
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
    assert "end of turn learned in 95.2% of documents" in text
    assert "1 documents truncated to data.max_length" in text
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
    assert any("end of turn learned in 0.0% of documents" in line for line in report.lines())


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
        ([{"body": "a"}], {}, r"1 of 1 rows.*row 1: the fields body are of no known format"),
        (
            [{"body": "a"}],
            {"max_bad_fraction": 1.0},
            r"no document to learn from: of 1 rows, 1 cannot be used \(the first: row 1: the field",
        ),
        (
            [{"instruction": "long " * 200, "output": "x"}] * 3,
            {"max_length": 32, "num_held_out": 1},
            r"no document to learn from: of 3 rows, 0.* 3 have no supervised token",
        ),
        (
            [{"instruction": "long " * 200, "output": "x"}] * 3,
            {"max_length": 32, "too_long": "drop"},
            r"no document to learn from.* 3 are over data\.max_length=32",
        ),
        (numbered(5), {"num_held_out": 5}, r"data\.num_held_out=5 leaves none of the 5 documents"),
        (numbered(5), {"num_held_out": 99}, r"data\.num_held_out=99 leaves none of the 5"),
        ([GOOD] * 9, {"num_held_out": 1}, r"data\.num_held_out=1 leaves none of the 9"),
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


def test_held_out_conversations_are_those_of_the_documents(tmp_path: Path, smollm2: Any) -> None:
    made = prepare(DataConfig(num_held_out=60, cache_dir=str(tmp_path)), smollm2)
    answers = {(row["instruction"], row["input"]): row for row in builtin.rows()}
    for i, spoken in enumerate(made.held_out_conversations):
        row = answers[spoken.turns[0].content, spoken.context]
        assert spoken.turns[1] == Turn("assistant", row["output"])
        assert dict(spoken.extra) == {"task": row["task"]}
        assert f"{row['output']}<|im_end|>" in smollm2.decode(made.held_out[i][0].tolist())


# Real data, and the command line.


def test_alpaca_in_seconds(alpaca: Path, smollm2: Any, tmp_path: Path) -> None:
    started = time.process_time()
    made = prepare(DataConfig(source=str(alpaca), cache_dir=str(tmp_path)), smollm2)
    seconds = time.process_time() - started
    report = made.report
    assert report.num_rows == 15_130 and report.num_bad_rows == 9
    assert report.num_documents + report.num_nothing_to_learn == 15_121
    assert all(": the answer is empty" in each for each in report.bad_rows)
    assert report.audit.end_of_turn_learned == 1 - report.num_truncated / report.num_documents
    assert seconds < 30  # about 6 of one core


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.source=/nowhere/rows.jsonl"], "data.source=/nowhere/rows.jsonl does not exist"),
        (["data.source=no-one/no-data"], "could not be loaded from the hub"),
        (["data.num_held_out=5000"], "data.num_held_out=5000 leaves none"),
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
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{name_or_path: {smollm2_folder}}}\n")
    words = ["prepare", str(config), f"data.cache_dir={tmp_path}", *settings]
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    told = capsys.readouterr().err
    assert left.value.code == 2
    assert said in told and told.count("\n") == 1 and "Traceback" not in told, told


def test_the_command_line_reports_what_it_prepared(
    tmp_path: Path, smollm2_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {{name_or_path: {smollm2_folder}}}\n")
    with pytest.raises(SystemExit) as left:
        cli.main(["prepare", str(config), f"data.cache_dir={tmp_path}", "data.num_held_out=9"])
    assert left.value.code == 0
    assert "3000 rows, 2991 documents to train on, 9 held out" in capsys.readouterr().out
