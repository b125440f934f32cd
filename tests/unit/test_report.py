"""The audit of the mask, and documents shown token by token."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neftune_dist import cli
from neftune_dist.config import DataConfig
from neftune_dist.data.dataset import prepare
from neftune_dist.data.report import preview
from tests.support.chat_families import FAMILIES, SYSTEM
from tests.support.corpora import numbered, texts
from tests.support.documents import with_template

ENDLESS = "{% for m in messages %}{{ m.content }} {% endfor %}"
BROKEN = {"instruction": "Nothing is said.", "output": ""}
CHARACTERS = {"instruction": "A cat?\nAn \x0bemoji?\x9b1m", "output": "😀\n\nTwo.  "}


def warnings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("data: warning:")]


def test_tokens_by_role(write: Callable[..., DataConfig], tiny_tokenizer: Any) -> None:
    """Phi 4's contents stand between special tokens, so that each can be counted by itself."""
    tokenizer = FAMILIES["phi-4"].tokenizer(tiny_tokenizer)
    rows = numbered(9)
    report = prepare(write(rows, system_prompt=SYSTEM), tokenizer).report
    count = {
        "user": sum(len(tokenizer(row["instruction"])["input_ids"]) for row in rows),
        "assistant": sum(len(tokenizer(row["output"])["input_ids"]) + 1 for row in rows),
        "system": 9 * len(tokenizer(SYSTEM)["input_ids"]),
        "tool": 0,
        "text": 0,
    }
    headers = sum(2 + len(tokenizer(role)["input_ids"]) for role in ("system", "user", "assistant"))
    count["template"] = 9 * (headers + 2)  # and the ends of the first two turns
    assert sum(count.values()) == report.num_tokens
    learned = {**dict.fromkeys(count, 0), "assistant": count["assistant"]}
    assert report.audit.num_supervised == learned
    share = f"{count['assistant'] / report.num_tokens:.1%}"
    line = next(line for line in report.lines() if "by role" in line)
    assert f"assistant {share} (100.0% of them supervised)" in line and "tool" not in line
    assert not warnings(report.lines())


def test_a_repeated_document_counts_as_often_as_an_epoch_has_it(
    write: Callable[..., DataConfig], tiny_tokenizer: Any
) -> None:
    once = prepare(write(numbered(4)), tiny_tokenizer).report
    thrice = prepare(write(numbered(4) * 3), tiny_tokenizer).report
    assert {k: 3 * v for k, v in once.audit.num_tokens.items()} == thrice.audit.num_tokens


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, []),
        (
            {"supervise": "all"},
            ["% of the supervised tokens are said by the user: data.supervise="],
        ),
        (
            {"max_length": 48, "max_cut_fraction": 1.0},
            ["end of turn is supervised in 1.0% of documents only"],
        ),
        ({"endless": True}, ["no end of turn is supervised: the model will not learn to stop"]),
    ],
)
def test_what_is_likely_a_mistake(
    settings: dict[str, Any],
    said: list[str],
    write: Callable[..., DataConfig],
    tiny_tokenizer: Any,
) -> None:
    tokenizer = tiny_tokenizer
    if settings.pop("endless", False):
        tokenizer = with_template(tokenizer, ENDLESS)
    rows = [{"instruction": "Talk.", "output": "word " * 60} for _ in range(99)]
    rows.append({"instruction": "Talk.", "output": "No."})
    told = warnings(prepare(write(rows, **settings), tokenizer).report.lines())
    assert len(told) == len(said)
    assert all(part in line for part, line in zip(said, told, strict=True))


def test_documents_are_shown(write: Callable[..., DataConfig], tiny_tokenizer: Any) -> None:
    config = write([BROKEN, *numbered(5), CHARACTERS], max_bad_fraction=0.5)
    made = prepare(config, tiny_tokenizer)
    lines = list(preview(made.train, ["rows.jsonl"], tiny_tokenizer, 3, colour=False))
    assert lines == list(preview(made.train, ["rows.jsonl"], tiny_tokenizer, 3, colour=False))
    # The first row is broken: document 1 is row 2.
    heads = [re.sub(r": \d+ tokens, \d+ supervised", "", line) for line in lines[::2]]
    assert heads == [f"document {i} of 6: rows.jsonl, row {i + 1}" for i in (1, 3, 5)]
    everything = list(preview(made.train, [""], tiny_tokenizer, 99, colour=False))[1::2]
    for i, said in enumerate(texts(made.train, tiny_tokenizer)):
        (ids, supervised), text = made.train[i], everything[i]
        bare = re.sub("[⟦⟧]", "", text).replace("↵↵\n", "\n\n").replace("↵\n", "\n")
        assert bare == said.replace("\x0b", "\u240b").replace("\x9b", "\ufffd")
        learned = tiny_tokenizer.decode(ids[supervised == 1].tolist())
        assert re.sub("[⟦⟧\n]", "", "".join(re.findall("⟦.*?⟧", text))) == learned.replace(
            "\n", "↵"
        )
    assert "⟦😀⟧" in everything[-1]


def test_the_command_line_shows_documents(
    tmp_path: Path,
    smollm2_folder: Path,
    write: Callable[..., DataConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = write(numbered(3))
    words = ["prepare", str(tmp_path / "run.yaml"), f"data.source={config.source}", "--show=2"]
    (tmp_path / "run.yaml").write_text(
        f"model: {{name_or_path: {smollm2_folder}}}\ndata: {{cache_dir: {config.cache_dir}}}\n"
    )
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert ran(words) == 0
    plain = capsys.readouterr().out
    assert "3 rows, 3 documents to train on, 0 held out" in plain
    assert "document 2 of 3" in plain and "row 2" in plain and "⟦<|im_end|>⟧" in plain
    assert "\x1b" not in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert ran(words) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[30;42m" in coloured and "⟦" not in coloured
    bare = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert bare == re.sub("[⟦⟧]", "", plain)


def ran(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return int(ended.value.code or 0)
