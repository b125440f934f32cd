"""`neftune-dist chat`: what a model is given is what it was taught to answer, turn by turn, and its
answers are those of greedy decoding; commands, two models, and what cannot be said."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models

from neftune_dist.cli import main
from neftune_dist.config import DataConfig, SourceConfig, UserError
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.errors import BadRow
from neftune_dist.data.formats import to_conversation
from neftune_dist.data.sources import open_source
from neftune_dist.data.tokenize import ConversationTokenizer
from neftune_dist.evaluation import chat as chat_verb
from neftune_dist.evaluation.target import open_target
from neftune_dist.model.generation import Generator
from tests.support import tiny_model

FEW = "evaluate.max_new_tokens=6"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [
        tiny_model.make_model(folder / name, seed=seed) for seed, name in enumerate(("one", "two"))
    ]


@pytest.fixture
def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Run the verb with these lines on its standard input; its output and its errors."""

    def run(lines: str, *words: object) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        with pytest.raises(SystemExit) as ended:
            main(["chat", *map(str, words)])
        said = capsys.readouterr()
        assert ended.value.code == (2 if said.err.startswith("neftune-dist: ") else 0)
        return said.out, said.err

    return run


def greedy(folder: Path, turns: list[Turn], most: int, penalty: float = 1.0) -> str:
    """What the verb should print, by forward passes of the model alone."""
    target = open_target(folder, settings=["model.dtype=bf16"])
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    text = target.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = target.tokenizer(text, add_special_tokens=False).input_ids
    said: list[int] = []
    while len(said) < most:
        with torch.no_grad():
            scores = target.model(torch.tensor([ids + said])).logits[0, -1].float()
        seen = torch.tensor(sorted({*ids, *said}))
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
        said.append(int(scores.argmax()))
        if said[-1] == target.tokenizer.eos_token_id:
            return shown(target.tokenizer.decode(said, skip_special_tokens=True)) + "\n"
    text = shown(target.tokenizer.decode(said, skip_special_tokens=True))
    return f"{text}\n[cut after {most} tokens: evaluate.max_new_tokens]\n"


def shown(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text).lstrip()


@pytest.mark.parametrize(
    "how", ["smollm2 chat", "smollm2 vicuna", "llama2 vicuna", "llama2 llama2"]
)
@pytest.mark.parametrize("supervise", ["assistant", "last", "all"])
def test_chat_prompt_equals_the_tokens_before_the_trained_answer(
    how: str, supervise: str, fastchat: Path, request: pytest.FixtureRequest
) -> None:
    name, template_name = how.split()
    tokenizer = request.getfixturevalue(name)
    template = ConversationTokenizer(
        tokenizer, DataConfig(template=template_name, supervise=supervise)
    )
    taught = ConversationTokenizer(tokenizer, DataConfig(template=template_name))
    rows = open_source(SourceConfig(str(fastchat))).rows
    talks = [to_conversation(row, "sharegpt") for (_, row), _ in zip(rows, range(5), strict=False)]
    assert max(len(talk.turns) for talk in talks) > 4
    for conversation in talks:
        [document] = taught.encode([taught.render(conversation)])
        learned = document.supervised
        begins = np.flatnonzero((learned[1:] == 1) & (learned[:-1] == 0)) + 1
        answers = [i for i, turn in enumerate(conversation.turns) if turn.role == "assistant"]
        assert len(begins) == len(answers)
        for i, begin in zip(answers, begins, strict=True):
            assert template.reply_ids(conversation.turns[:i]) == document.input_ids[:begin].tolist()
        assert template.reply_ids(conversation.turns[: answers[0]]) == template.prompt_ids(
            conversation
        )


def test_tokens_do_not_cross_into_earlier_answers(smollm2: Any, tmp_path: Path) -> None:
    path = tmp_path / "plain.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    template = ConversationTokenizer(smollm2, DataConfig(template=str(path)))
    said = [Turn("user", "Why?"), Turn("assistant", '"So," he said.')] * 2
    [document] = template.encode([template.render(Conversation(tuple(said)))])
    text = smollm2.decode(document.input_ids)
    assert smollm2(text).input_ids != document.input_ids.tolist()  # ':"' is one token of its own
    ids = template.reply_ids(said[:3])
    assert ids == document.input_ids[: len(ids)].tolist()
    assert smollm2.decode(ids) == text[: text.rindex('"So')]


def test_single_question_template_refuses_a_second(smollm2: Any) -> None:
    template = ConversationTokenizer(smollm2, DataConfig(template="alpaca"))
    asked = Turn("user", "Why?")
    spoken = Conversation((asked, Turn("assistant", "So.")))
    assert template.reply_ids([asked]) == template.prompt_ids(spoken)
    with pytest.raises(BadRow, match="the Alpaca prompt takes one instruction"):
        template.reply_ids([asked, Turn("assistant", "So."), asked])


def test_conversation_continues_until_reset(
    models: list[Path], talk: Callable[..., tuple[str, str]]
) -> None:
    lines = "What is 1 + 1?\nAnd 2 + 2?\n/reset\nAnd 2 + 2?\n/system Count.\nAnd 2 + 2?\n"
    out, err = talk(lines, models[0], FEW, "evaluate.repetition_penalty=1")
    assert err == ""
    one, two = Turn("user", "What is 1 + 1?"), Turn("user", "And 2 + 2?")
    first = greedy(models[0], [one], 6)
    said = Turn("assistant", first.rpartition("\n[cut")[0].strip() or first.strip())
    second = greedy(models[0], [one, said, two], 6)
    fresh = greedy(models[0], [two], 6)
    counted = greedy(models[0], [Turn("system", "Count."), two], 6)
    assert out == first + second + fresh + counted
    assert len({second, fresh, counted}) == 3


def test_penalty_and_limit_are_those_of_evaluate(
    models: list[Path], talk: Callable[..., tuple[str, str]]
) -> None:
    out, _ = talk("Why?\n", models[0], "evaluate.max_new_tokens=9", "evaluate.repetition_penalty=3")
    asked = [Turn("user", "Why?")]
    assert out == greedy(models[0], asked, 9, penalty=3.0)
    assert out != greedy(models[0], asked, 9)
    torch.manual_seed(0)
    drawn = {talk("Why?\n", models[0], FEW, "--temperature", 5)[0] for _ in range(3)}
    assert len(drawn) == 3
    cold, _ = talk("Why?\n", models[0], "evaluate.max_new_tokens=9", "--temperature", 1e-300)
    assert cold == talk("Why?\n", models[0], "evaluate.max_new_tokens=9")[0]


def test_line_of_bytes_that_are_no_text_is_refused_alone(
    models: list[Path], talk: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"Why\xff?\n/system \xff\nWhy?\n"), "utf-8")
    monkeypatch.setattr(io, "StringIO", lambda lines: typed)
    out, err = talk("", models[0], FEW)
    assert err == "This line is not text in utf-8.\n" * 2
    monkeypatch.undo()
    assert out == talk("Why?\n", models[0], FEW)[0]


def test_two_models_answer_the_same_question(
    models: list[Path], talk: Callable[..., tuple[str, str]]
) -> None:
    settings = (FEW, "evaluate.repetition_penalty=1")
    out, _ = talk("Why?\n", *models, *settings)
    asked = [Turn("user", "Why?")]
    one, two = (greedy(folder, asked, 6) for folder in models)
    assert out == f"--- one\n{one}--- two\n{two}"
    assert one != two


def test_side_by_side_wraps_into_columns() -> None:
    texts = ["A short one.\n\nWith two parts.", "word " * 12]
    lines = chat_verb.side_by_side(["left", "right"], texts, 71)
    assert lines == [
        "left                               | right",
        "---------------------------------- | ----------------------------------",
        "A short one.                       | word word word word word word word",
        "                                   | word word word word word",
        "With two parts.                    |",
    ]
    narrow = chat_verb.side_by_side(["left", "right"], ["a\nb", "c"], 60)
    assert narrow == ["--- left", "a", "b", "--- right", "c"]


def test_ctrl_c_stops_the_answer_and_keeps_its_text(
    models: list[Path],
    talk: Callable[..., tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[int] = []
    put = chat_verb._Pieces.put

    def interrupted(pieces: Any, value: Any) -> None:
        put(pieces, value)
        if pieces.num_tokens == 0:
            given.append(value.numel())
        if pieces.num_tokens == 4 and len(given) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat_verb._Pieces, "put", interrupted)
    # A shell's background process, as CI may be, starts with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        out, _ = talk("Why?\nWhy?\n", models[0], FEW, "evaluate.repetition_penalty=1")
    finally:
        signal.signal(signal.SIGINT, before)
    first, _, rest = out.partition("\n[stopped]\n")
    whole = greedy(models[0], [Turn("user", "Why?")], 6)
    assert first and whole.startswith(first) and not whole.startswith(f"{first}\n[cut")
    said = Turn("assistant", first.strip())
    assert rest == greedy(models[0], [Turn("user", "Why?"), said, Turn("user", "Why?")], 6)


def test_control_characters_are_not_printed(models: list[Path]) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models[0])
    texts: list[str] = []
    pieces = chat_verb._Pieces(tokenizer, set(), texts.append)
    pieces.put(torch.tensor([[1, 2, 3]]))
    said = " a\x1b[2Jb\r\nc\u202e\r \u65e5\u3000\u672c \U0001f468\u200d\U0001f469 1\xa0%"
    for token in tokenizer(said, add_special_tokens=False).input_ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    kept = "\u65e5\u3000\u672c \U0001f468\u200d\U0001f469 1\xa0%"
    assert "".join(texts) == pieces.shown == f"a\ufffd[2Jb\nc\ufffd\ufffd {kept}"
    assert pieces.said == said[1:]  # which the conversation goes on with


def test_conversation_goes_on_as_the_model_said(
    models: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    speaker = chat_verb.Speaker(open_target(models[0]), 0.0)
    said = speaker.target.tokenizer("a\x1b b", add_special_tokens=False).input_ids

    def run(*_: Any, streamer: Any, **__: Any) -> None:
        for token in [0, *said]:
            streamer.put(torch.tensor([token]))
        streamer.end()

    monkeypatch.setattr(Generator, "run", run)
    assert speaker.answer("Why?", lambda _: None)[0] == "a\ufffd b"
    assert speaker.turns[-1].content == "a\x1b b"


def test_text_is_that_of_all_tokens_together() -> None:
    """Of a line alone, tokenizers made from sentencepiece leave out the space it begins with."""
    names = ["<unk>", "</s>", "\n", *map("▁".__mul__, range(1, 5)), *"abc:好🙂"]
    backend = Tokenizer(tokenizer_models.Unigram([(name, -1.0) for name in names], 0))
    backend.decoder = decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    texts: list[str] = []
    pieces = chat_verb._Pieces(tokenizer, {1}, texts.append)
    said = [*"a:", "\n", "▁▁▁▁", *"bc", "\n", "▁▁", *"a好b", "</s>"]
    for token in [0, *tokenizer.convert_tokens_to_ids(said)]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert texts == ["a:\n", "    ", "bc\n", "  ", "a好", "b"]
    assert pieces.said == "a:\n    bc\n  a好b" and pieces.ended


def test_mistakes_do_not_end_the_conversation(
    models: list[Path], talk: Callable[..., tuple[str, str]]
) -> None:
    lines = f"/nonsense\n{'why ' * 3000}\nWhy?\n/quit\nWhy?\n"
    out, err = talk(lines, models[0], FEW, "evaluate.repetition_penalty=1")
    assert out == greedy(models[0], [Turn("user", "Why?")], 6)
    assert "There is no command /nonsense." in err
    assert "the model takes 2048 with the answer: /reset forgets it" in err


def test_single_question_template_forgets_earlier_turns(
    models: list[Path], talk: Callable[..., tuple[str, str]]
) -> None:
    out, err = talk("Why?\nWhy?\n/system Be brief.\n", models[0], FEW, "data.template=alpaca")
    first, second = out[: len(out) // 2], out[len(out) // 2 :]
    assert first == second
    assert "The template of one takes one question" in err
    assert "That cannot be said: the Alpaca prompt takes one instruction" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{bare}"], "has no chat template: set data.template=alpaca, vicuna, llama2"),
        (["{one}", "{two}", "{one}"], "chat takes one model or two, not 3"),
        (["evaluate.batch_size=1"], "chat needs a model"),
        (["{one}", "evaluate.max_new_token=1"], "evaluate.max_new_token"),
        (["{one}", "--temperature=-1"], "--temperature: -1.0 is out of range"),
    ],
)
def test_unusable_arguments_exit_2(
    words: list[str],
    message: str,
    models: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    talk: Callable[..., tuple[str, str]],
) -> None:
    bare = tiny_model.make_model(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    capsys.readouterr()  # what transformers says as it writes the model
    names = {"one": models[0], "two": models[1], "bare": bare}
    out, err = talk("", *(word.format(**names) for word in words))
    assert err.startswith("neftune-dist: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    with pytest.raises(UserError, match="no chat template"):
        chat_verb.chat([str(bare)], [])
