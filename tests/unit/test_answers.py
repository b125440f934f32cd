"""Instruction sets, and answers that do not depend on the batch they were made in."""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from neftune_dist.config import DataConfig, EvaluateConfig, UserError
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.formats import to_conversation
from neftune_dist.data.instructions import Instruction, read_instructions, read_prompts
from neftune_dist.data.tokenize import ConversationTokenizer
from neftune_dist.distributed.world import World
from neftune_dist.evaluation import answers as answering
from neftune_dist.evaluation.answers import Draws, answer_all
from neftune_dist.evaluation.target import EvaluationTarget, open_target
from neftune_dist.model import generation
from neftune_dist.model.generation import Generated, Generator, batches, generate
from tests.support import tiny_model
from tests.support.shared_data import shared
from tests.support.shrunk import shrunk

WORDS = [
    "model.dtype=fp32",
    "evaluate.max_new_tokens=24",
    "evaluate.batch_size=4",
    "evaluate.repetition_penalty=1.5",
]
END = 400  # a token that the model below says now and then


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> EvaluationTarget:
    found = open_target(
        tiny_model.make_model(tmp_path_factory.mktemp("model"), tied=False), settings=WORDS
    )
    with torch.no_grad():
        found.model.lm_head.weight[END] *= 2.2
    vars(found)["end_tokens"] = [END]
    return found


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    made = World()
    yield made
    made.close()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [END, *torch.randint(3, 399, (length,), generator=generator).tolist()[1:]]
        for length in (5, 17, 2, 9, 30, 9, 1, 12, 26, 4)
    ]


def by_hand(model: Any, prompt: list[int], config: EvaluateConfig, end: int) -> list[int]:
    """Greedy decoding of one prompt with the penalty of CTRL, without cache or padding; the
    end of an answer is not penalised, although every prompt holds it."""
    ids = list(prompt)
    for _ in range(config.max_new_tokens):
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, -1]
        for token in set(ids) - {end}:
            factor = config.repetition_penalty
            scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
        ids.append(int(scores.argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def test_a_padded_batch_answers_as_each_prompt_alone(target: EvaluationTarget) -> None:
    config = target.config.evaluate
    said = [by_hand(target.model, prompt, config, END) for prompt in prompts()]
    finished = [tokens[-1] == END for tokens in said]
    assert {True, False} == set(finished)
    expected = [
        Generated(
            target.tokenizer.decode([t for t in tokens if t != END]).strip(),
            len(tokens) - done,
            done,
        )
        for tokens, done in zip(said, finished, strict=True)
    ]
    assert generate(target.generator, prompts()) == expected


@pytest.mark.parametrize("model_type", ["bart", "roberta", "rwkv"])
def test_model_that_padding_disturbs_answers_as_alone(model_type: str) -> None:
    """Positions that count padding, that begin after its number, and a state that holds it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shrunk(model_type)).eval()
    model.generation_config = transformers.GenerationConfig()
    config, device = EvaluateConfig(max_new_tokens=6), torch.device("cpu")
    generator, short = Generator(model, None, [2], config, device), [p[:9] for p in prompts()]
    asked = [[3 + token % 80 for token in prompt] for prompt in short]
    with torch.no_grad():
        for batch in batches(asked, config, model.config, "Prompt"):
            rows = generator.run([asked[i] for i in batch], 6).tolist()
            for i, row in zip(batch, rows, strict=True):
                said = by_hand(model, asked[i], config, 2)
                assert row[: len(said)] == said


def instructions(number: int) -> list[Instruction]:
    return [
        Instruction(Conversation((Turn("user", f"Number {i}?"),)), f"Number {i}?", "set", None)
        for i in range(number)
    ]


def test_second_call_continues(
    target: EvaluationTarget, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, batches = instructions(10), list[list[int]]()
    (tmp_path / "whole").mkdir()
    whole = answer_all(target, asked, prompts(), tmp_path / "whole", world)
    assert [row["instruction"] for row in whole] == [instruction.text for instruction in asked]

    def counted(generator: Any, rows: Any, *rest: Any) -> list[Generated]:
        batches.append([len(row) for row in rows])
        if len(batches) == 2:
            raise KeyboardInterrupt
        return generate(generator, rows, *rest)

    cut = tmp_path / "cut"
    cut.mkdir()
    monkeypatch.setattr(answering, "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        answer_all(target, asked, prompts(), cut, world)
    assert len((cut / "answers.jsonl").read_text().splitlines()) == 4
    lines = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines(keepends=True)
    # The second batch as a crash may leave it: all but the last character.
    (cut / "answers.jsonl").write_text("".join(lines[:8])[:-1])
    assert answer_all(target, asked, prompts(), cut, world) == whole
    assert batches == [[30, 26, 17, 12], [9, 9, 5, 4], [9, 9, 5, 4], [2, 1]]
    # Dealt to other ranks in the meantime, and in other batches: what is there is there.
    (cut / "answers.jsonl").rename(cut / "answers3.jsonl")
    assert answer_all(target, asked, prompts(), cut, world) == whole
    assert len(batches) == 4


def test_draws_have_the_softmax_of_the_scores_at_the_temperature() -> None:
    scores, temperature, num = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5]), 0.7, 20_000
    draws = Draws([[5]] * num, range(num), temperature)
    state = torch.random.get_rng_state()
    found = draws(torch.zeros(num, 3), scores.expand(num, -1)).argmax(dim=1)
    assert torch.equal(state, torch.random.get_rng_state())
    share = torch.bincount(found, minlength=5) / num
    expected = (scores / temperature).softmax(dim=0)
    # Four standard errors of a share.
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / num).sqrt()).all()
    # Over as many draws as a long answer takes, none is infinite.
    noise = Draws([[5]] * 400, range(400), 1.0)(torch.zeros(400, 1), torch.zeros(400, 50_001))
    assert noise.isfinite().all() and noise.mean() == pytest.approx(0.5772, abs=0.002)


def test_sampled_answers_depend_on_prompt_and_sample_alone(
    target: EvaluationTarget, world: World, tmp_path: Path
) -> None:
    config = copy.deepcopy(target.config)
    config.evaluate.samples, config.evaluate.temperature = 3, 1.0
    sampling = replace(target, config=config)
    vars(sampling).update({name: vars(target)[name] for name in ("model", "end_tokens")})
    for name in ("four", "alone", "fewer"):
        (tmp_path / name).mkdir()
    four = answer_all(sampling, instructions(10), prompts(), tmp_path / "four", world)
    assert [(row["instruction"], row["sample"]) for row in four] == [
        (f"Number {i}?", sample) for i in range(10) for sample in range(3)
    ]
    outputs = [row["output"] for row in four]
    assert sum(len({*outputs[i : i + 3]}) == 3 for i in range(0, 30, 3)) > 8
    config.evaluate.batch_size = 1
    assert answer_all(sampling, instructions(10), prompts(), tmp_path / "alone", world) == four
    config.evaluate.samples, config.evaluate.batch_size = 2, 5
    fewer = answer_all(sampling, instructions(3), prompts()[4:7], tmp_path / "fewer", world)
    assert [row["output"] for row in fewer] == [
        outputs[3 * i + sample] for i in (4, 5, 6) for sample in range(2)
    ]
    # Near temperature 0 they are the greedy answers.
    greedy = generate(target.generator, prompts())
    assert generate(target.generator, prompts(), [Draws(prompts(), [7] * 10, 1e-6)]) == greedy


def test_long_prompt_shortens_only_its_own_answer(
    target: EvaluationTarget, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = generate(target.generator, prompts())
    monkeypatch.setattr(generation, "longest_document", lambda _: 50)
    rows = answer_all(target, instructions(10), prompts(), tmp_path, world)
    for row, prompt, generated in zip(rows, prompts(), free, strict=True):
        room = min(24, 50 - len(prompt))
        assert row["num_tokens"] == min(generated.num_tokens, room)
    monkeypatch.setattr(generation, "longest_document", lambda _: 30)
    with pytest.raises(UserError, match="Instruction 5 has 30 tokens"):
        answer_all(target, instructions(10), prompts(), tmp_path, world)


def test_prompts_follow_the_targets_template(target: EvaluationTarget, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "1 2", "output": "3"}]))
    [[asked], _] = read_instructions(str(path), 0)
    ids = target.template.prompt_ids(asked.conversation)
    assert target.tokenizer.decode(ids) == "<|user|>\nAdd.\n\n1 2<|assistant|>\n"
    alpaca = ConversationTokenizer(target.tokenizer, DataConfig(template="alpaca"))
    text = target.tokenizer.decode(alpaca.prompt_ids(asked.conversation))
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:" in text


@pytest.mark.parametrize("given", ["", " ", "1 2", None])
def test_evaluation_asks_the_prompt_of_training(
    given: str | None, target: EvaluationTarget, tmp_path: Path
) -> None:
    row = {"instruction": "Add.", "input": given, "output": "3", "system": ""}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row]))
    [[asked], _] = read_instructions(str(path), 0)
    trained = to_conversation(row, "alpaca")
    for name in ("alpaca", "vicuna", "chat"):
        template = ConversationTokenizer(target.tokenizer, DataConfig(template=name))
        ids = template.prompt_ids(asked.conversation)
        assert ids == template.prompt_ids(trained)
        [document] = template.encode([template.render(trained)])
        assert document.input_ids[: len(ids)].tolist() == ids


def test_instruction_sets_of_every_form_are_read(tmp_path: Path) -> None:
    rows = {
        "alpaca_eval": {"instruction": "A", "dataset": "koala", "output": "x", "generator": "g"},
        "alpaca": {"instruction": "A", "input": "B", "output": "x"},
        "wizard": {"Instruction": "A", "Skill": "Math"},
        "mt_bench": {"question_id": 1, "category": "writing", "turns": ["A", "B"]},
        "vicuna": {"question_id": 1, "text": "A", "category": "generic"},
    }
    found = {}
    for name, row in rows.items():
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n" + json.dumps(row) + "\n")
        [asked], number = read_instructions(str(tmp_path / f"{name}.jsonl.gz"), 1)
        assert number == 2
        found[name] = (
            *(asked.text, asked.dataset, asked.reference),
            asked.conversation.num_left_out,
        )
    assert found == {
        "alpaca_eval": ("A", "koala", None, 0),  # what another model said is not what is expected
        "alpaca": ("A\n\nB", "alpaca", "x", 0),
        "wizard": ("A", "wizard", None, 0),
        "mt_bench": ("A", "writing", None, 1),
        "vicuna": ("A", "generic", None, 0),
    }


@pytest.mark.parametrize(
    ("row", "needle"),
    [
        ({"prompt": "A"}, "field 'instruction' is missing; there are prompt"),
        ({"instruction": 3}, "field 'instruction' is not text but int"),
        ({"instruction": " "}, "the instruction is empty"),
        ({"turns": []}, "field 'turns' is not a list of questions but an empty list"),
        ({"turns": [None]}, "field 'turns' is not text but null"),
        ({"instruction": "A", "output": 7}, "field 'output' is not text but int"),
    ],
)
def test_unusable_instruction_rows_are_refused(
    tmp_path: Path, row: dict[str, Any], needle: str
) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"instruction": "A"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError) as raised:
        read_instructions(str(path), 0)
    assert f"evaluate.instructions={path}, row 2: {needle}" in str(raised.value)
    path.write_text("")
    with pytest.raises(UserError, match="holds no row"):
        read_instructions(str(path), 0)


def test_published_instruction_sets_are_read() -> None:
    folder = shared("data/eval/alpaca_eval")
    for name in ("alpaca-7b.outputs.json.gz", "text_davinci_003.outputs.json.gz"):
        found, number = read_instructions(str(folder / name), 0)
        assert (len(found), number) == (805, 805)
        groups = {instruction.dataset for instruction in found}
        assert groups == {"helpful_base", "koala", "oasst", "selfinstruct", "vicuna"}
        assert not any(instruction.reference for instruction in found)
    found, _ = read_instructions(str(shared("data/eval/mt_bench_question.jsonl.gz")), 0)
    assert len(found) == 80
    assert len({instruction.dataset for instruction in found}) == 8
    assert {instruction.conversation.num_left_out for instruction in found} == {1}


def test_prompts_of_a_file_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("Hel\u2028lo?\n\nWhy?\n")
    asked = read_prompts("~/prompts.txt", "evaluate.sample_prompts")
    assert [instruction.text for instruction in asked] == ["Hel\u2028lo?", "Why?"]


def test_prompt_that_cannot_be_asked_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffHello?\n\n<image> What?\n", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"prompts\.txt, line 3: <image> stands for what a text mod"
    ):
        read_prompts(str(path), "evaluate.sample_prompts")
    path.write_text("\ufeffHello?\n", encoding="utf-8")
    assert read_prompts(str(path), "evaluate.sample_prompts")[0].text == "Hello?"


@pytest.mark.parametrize("name", ["pipe.txt", "pipe.jinja"])
def test_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path, tiny_tokenizer: Any) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"\.{name.partition('.')[2]} cannot be read: it is not a"):
        if name.endswith("txt"):
            read_prompts(str(tmp_path / name), "evaluate.sample_prompts")
        else:
            ConversationTokenizer(tiny_tokenizer, DataConfig(template=str(tmp_path / name)))
