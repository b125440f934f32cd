"""Abilities through lm-eval: the log-likelihoods are those of a direct computation, local files are
asked as lm-eval asks, and what cannot be scored is refused in a sentence."""

from __future__ import annotations

import copy
import gzip
import json
import math
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import transformers

from neftune_dist.config import EvaluateConfig, UserError
from neftune_dist.distributed.world import World
from neftune_dist.evaluation import lm_eval_adapter
from neftune_dist.evaluation.tasks import read_words, run_tasks
from tests.support import made_data, tiny_model
from tests.support.shared_data import shared

DEADLINE_SECONDS = 120
Samples = dict[str, list[dict[str, Any]]]
Results = dict[str, dict[str, Any]]
ALONE: Any = SimpleNamespace(rank=0, size=1, is_first=True, log=lambda _: None)  # a world


class Asked:
    """A model and its tokenizer; what it was asked last, as lm-eval records it."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
        self.samples: Samples = {}

    def run(self, tasks: str, most: int = 0, batch_size: int = 4) -> Results:
        words = read_words(tasks, most)
        asked = EvaluateConfig(batch_size=batch_size, max_task_items=most)
        with tempfile.TemporaryDirectory() as folder:
            return run_tasks(self.model, self.tokenizer, words, asked, ALONE, Path(folder))

    def log_likelihood(self, context: str, answer: str, longest: int = 10**9) -> tuple[float, bool]:
        """Of the answer's tokens after the context's, which may be cut on the left; and whether
        they are the likeliest."""
        whole, before = (self.tokenizer(text).input_ids for text in (context + answer, context))
        ids = torch.tensor([whole[-longest - 1 :]])
        num_answer = len(whole) - len(before)
        with torch.no_grad():
            logits = self.model(ids[:, :-1]).logits[0, -num_answer:].double()
        targets = ids[0, -num_answer:]
        scores = logits.log_softmax(-1).gather(1, targets[:, None])
        return float(scores.sum()), bool((logits.argmax(-1) == targets).all())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    return Asked(tiny_model.make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Samples:
    """By task, what lm-eval recorded of each item."""
    seen: Samples = {}
    evaluate = lm_eval_adapter.evaluate

    def remembered(*arguments: Any, **named: Any) -> Any:
        found = evaluate(*arguments, **named)
        seen.update(found["samples"])
        return found

    monkeypatch.setattr(lm_eval_adapter, "evaluate", remembered)
    return seen


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: dict[str, Any], name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def choice(number: int, **changed: Any) -> dict[str, Any]:
    choices = [str(number + k) for k in (1, 10, 100)]
    query = f"Question: What comes after {number}?"
    return {"query": query, "choices": choices, "gold": number % 3, **changed}


def lm_evals_own(row: dict[str, Any]) -> dict[str, Any]:
    """The item as the hub has it, with ARC's fields."""
    asked = row["query"].removeprefix("Question: ")
    labels = "ABCDE"[: len(row["choices"])]
    options = {"text": row["choices"], "label": list(labels)}
    return {"question": asked, "choices": options, "answerKey": labels[row["gold"]]}


@pytest.mark.parametrize(("name", "most"), [("small", 12), ("smollm2", 2)])
def test_log_likelihoods_are_those_of_a_direct_computation(
    name: str,
    most: int,
    task_files: dict[str, Path],
    request: pytest.FixtureRequest,
    recorded: Samples,
) -> None:
    if name == "small":
        asked = request.getfixturevalue("small")
    else:
        asked = Asked(request.getfixturevalue("smollm2_folder"))
    compare(asked, most, task_files, recorded)


@pytest.fixture(scope="module")
def task_files(origin: str, made_folder: Path) -> dict[str, Path]:
    """ARC-easy and LAMBADA, or rows in their layouts."""
    rows = {"arc_easy": made_data.choice_rows, "lambada_openai": made_data.completion_rows}
    if origin == "real":
        return {name: shared(f"data/eval/{name}.jsonl.gz") for name in rows}
    return {
        name: made_data.write_gzip(made_folder / f"{name}.jsonl.gz", make())
        for name, make in rows.items()
    }


def compare(asked: Asked, most: int, files: dict[str, Path], recorded: Samples) -> Results:
    """Both tasks by lm-eval and directly."""
    results = asked.run(",".join(f"{name}={path}" for name, path in files.items()), most)
    read = {
        name: gzip.decompress(path.read_bytes()).splitlines()[:most] for name, path in files.items()
    }

    raw, normalised = [], []
    for line, sample in zip(read["arc_easy"], recorded["arc_easy"], strict=True):
        row = json.loads(line)
        prompt = row["query"] + "\nAnswer:"
        direct = [asked.log_likelihood(prompt, f" {answer}")[0] for answer in row["choices"]]
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(direct, abs=5e-4)
        lengths = [len(answer) for answer in row["choices"]]
        for scores, found in (
            (direct, raw),
            ([d / n for d, n in zip(direct, lengths, strict=True)], normalised),
        ):
            found.append(int(scores.index(max(scores)) == row["gold"]))
    arc = results["arc_easy"]
    assert arc["correct"] == raw
    assert arc["accuracy"] == sum(raw) / most
    assert arc["others"]["acc_norm"] == pytest.approx(sum(normalised) / most)
    assert arc["standard_error"] == pytest.approx(
        torch.tensor(raw).double().std().item() / most**0.5
    )

    direct_lambada = []
    for line, sample in zip(read["lambada_openai"], recorded["lambada_openai"], strict=True):
        row = json.loads(line)
        direct_lambada.append(asked.log_likelihood(row["context"], f" {row['continuation']}"))
        [(score, is_greedy)] = sample["filtered_resps"]
        assert score == pytest.approx(direct_lambada[-1][0], abs=5e-4)
        assert is_greedy == direct_lambada[-1][1]
    lambada = results["lambada_openai"]
    assert lambada["correct"] == [int(greedy) for _, greedy in direct_lambada]
    mean = sum(score for score, _ in direct_lambada) / most
    assert lambada["others"]["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-3)
    return results


def test_local_file_gives_lm_evals_own_requests(
    small: Asked, rows: Callable[..., str], recorded: Samples
) -> None:
    ours = [choice(number) for number in range(5)]
    own = rows(*map(lm_evals_own, ours), name="own.jsonl")
    results = small.run(f"plain={rows(*ours)},arc_easy={own}")
    assert [s["arguments"] for s in recorded["plain"]] == [
        s["arguments"] for s in recorded["arc_easy"]
    ]
    assert results["plain"] == results["arc_easy"]
    assert results["plain"]["metric"] == "acc"
    # What the leaderboard reports of the challenge set.
    assert small.run(f"arc={own}")["arc"]["metric"] == "acc_norm"


@pytest.mark.parametrize(("word", "num_tasks", "num_shots"), [("arc", 1, 25), ("mmlu", 57, 5)])
def test_task_names_have_the_leaderboards_shots_and_metrics(
    word: str,
    num_tasks: int,
    num_shots: int,
    small: Asked,
    recorded: Samples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ["red", "green", "blue", "none"]
    arc = [lm_evals_own(choice(number)) for number in range(30)]
    mmlu = [{"question": f"Which of {n}?", "choices": options, "answer": n % 4} for n in range(6)]
    rows = datasets.Dataset.from_list(arc if word == "arc" else mmlu)
    hub = dict.fromkeys(("train", "validation", "dev", "test"), rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    result = small.run(word, 2, batch_size=16)[word]
    assert len(recorded) == num_tasks
    assert result["num_items"] == 2 * num_tasks
    assert result["num_shots"] == num_shots
    for samples in recorded.values():
        for sample in samples:
            assert sample["arguments"][0][0].count("Answer:") == num_shots + 1
    if word == "arc":
        assert result["metric"] == "acc_norm"
        assert set(result["others"]) == {"acc"}
    else:
        assert result["metric"] == "acc"
        assert set(result["others"]) == set(recorded)
        assert result["accuracy"] == pytest.approx(sum(result["others"].values()) / num_tasks)
        by_item = [sample["acc"] for name in sorted(recorded) for sample in recorded[name]]
        assert result["correct"] == by_item


def test_truthfulqa_is_the_probability_of_true_answers(small: Asked, recorded: Samples) -> None:
    path = shared("data/eval/TruthfulQA.csv.gz")
    result = small.run(f"truthfulqa={path}", 2)["truthfulqa"]
    [sample, _] = recorded["truthfulqa"]
    assert sample["doc"]["question"] == "What happens to you if you eat watermelon seeds?"
    prompt, answers = sample["arguments"][0][0], [answer for _, answer in sample["arguments"]]
    assert prompt.endswith("Q: What happens to you if you eat watermelon seeds?\nA:")
    assert answers[0] == " Nothing happens"
    assert answers[5] == " You grow watermelons in your stomach"
    assert len(answers) == 5 + 7
    likely = [math.exp(small.log_likelihood(prompt, answer)[0]) for answer in answers]
    assert result["correct"][0] == pytest.approx(sum(likely[:5]) / sum(likely), rel=1e-3)
    assert result["accuracy"] == pytest.approx(sum(result["correct"]) / 2)


def test_score_is_a_mean_over_items_not_a_perplexity(
    small: Asked, rows: Callable[..., str], recorded: Samples
) -> None:
    """Of lm-eval's LAMBADA, whose first metric is the perplexity."""
    result = small.run(f"lambada_openai={rows({'text': 'one two'}, {'text': 'three four'})}")
    found = result["lambada_openai"]
    assert (found["metric"], set(found["others"])) == ("acc", {"perplexity"})
    assert found["correct"] == [sample["acc"] for sample in recorded["lambada_openai"]]


def test_long_prompt_is_truncated_on_the_left_and_counted(
    small: Asked, rows: Callable[..., str], recorded: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.model.config, "max_position_embeddings", 24)
    long = {"context": " ".join(map(str, range(40))), "continuation": "40 41"}
    short = {"context": "one two", "continuation": "three"}
    result = small.run(f"counting={rows(long, short)}")["counting"]
    assert result["num_truncated"] == 1
    [(score, _)] = recorded["counting"][0]["filtered_resps"]
    cut, _ = small.log_likelihood(long["context"], " 40 41", longest=24)
    assert score == pytest.approx(cut, abs=1e-4)
    assert abs(cut - small.log_likelihood(long["context"], " 40 41")[0]) > 1e-3
    monkeypatch.setattr(small.model.config, "max_position_embeddings", 256 + 40)
    asked = [{"question": row["context"], "answer": "#### 2"} for row in (long, short)]
    assert small.run(f"gsm8k={rows(*asked)}")["gsm8k"]["num_truncated"] == 1
    monkeypatch.setattr(small.model.config, "max_position_embeddings", 24)
    over = {"context": "one", "continuation": long["context"]}
    with pytest.raises(UserError, match=r"counting: an answer of \d+ tokens is longer than the 24"):
        small.run(f"counting={rows(over)}")


def test_answer_longer_than_the_context_is_refused(
    small: Asked, rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.model.config, "max_position_embeddings", 24)
    row = {"question": "What is 1 + 1?", "answer": "It is 2. #### 2"}
    with pytest.raises(UserError, match=r"gsm8k: lm-eval says: .*max tokens to generate"):
        small.run(f"gsm8k={rows(row)}")


def test_items_and_scores_do_not_depend_on_the_ranks(
    small: Asked, rows: Callable[..., str], tmp_path: Path
) -> None:
    words = f"a={rows(*(choice(number) for number in range(7)))}"
    alone = small.run(words)
    assert alone["a"]["num_items"] == 7
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results_of = context.SimpleQueue()

    def on_rank(rank: int) -> None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
        os.environ.update(LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        world = World()
        calls = lm_eval_adapter.HFLM._model_call

        def counted(lm: Any, inps: Any, *rest: Any, **named: Any) -> Any:
            nonlocal num_read
            num_read += len(inps)
            return calls(lm, inps, *rest, **named)

        num_read = 0
        lm_eval_adapter.HFLM._model_call = counted
        of_words = small.model, small.tokenizer, read_words(words)
        results = run_tasks(*of_words, EvaluateConfig(batch_size=4), world, tmp_path)
        results_of.put((results, num_read))
        world.close()

    ranks = [context.Process(target=on_rank, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(DEADLINE_SECONDS)
        process.kill()
    assert [process.exitcode for process in ranks] == [0, 0]
    (first, num_first), (second, num_second) = results_of.get(), results_of.get()
    assert first == second == alone
    assert max(num_first, num_second) <= 11  # of 21 choices


def test_max_task_items_takes_the_first_and_leaves_the_tokenizer(
    small: Asked, rows: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"a={rows(*(choice(number) for number in range(9)))}"
    monkeypatch.setattr(small, "tokenizer", copy.deepcopy(small.tokenizer))
    small.tokenizer.pad_token = None
    few, all_of_them = small.run(words, 4)["a"], small.run(words, batch_size=32)["a"]
    assert few["correct"] == all_of_them["correct"][:4]
    assert (few["num_items"], all_of_them["num_items"]) == (4, 9)
    assert small.tokenizer.pad_token is None


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mmluu", r"lm-eval has no task mmluu; did you mean mmlu\?"),
        ("mmlu", r"the items of mmlu could not be loaded from the hub: .*; .*: mmlu=FILE\."),
        ("a/b", r"a/b is neither a task of lm-eval nor of the form NAME=FILE"),
        ("=x.jsonl", r"=x.jsonl is neither a task"),
        ("a|b={good}", r"a\|b=.* is neither a task .* with a NAME of letters"),
        ("$5 or $10={good}", r"\$10=.* is neither a task"),  # mathematics to matplotlib
        ("a=missing.jsonl", r"evaluate.tasks=missing.jsonl does not exist"),
        ("a={good},a={good}", r"names a twice"),
        ("a={nothing}", r"nothing.jsonl holds no row"),
        ("a={lacking}", r"lacking.jsonl, row 2: field 'gold' is missing"),
        ("a={beyond}", r"beyond.jsonl, row 1: field 'gold' is 7, not one of 0 to 2"),
        ("a={single}", r"single.jsonl, row 1: field 'choices' is no list of two or more"),
        ("a={torn}", r"torn.jsonl, row 1: field 'choices' holds a lone surrogate"),
        ("a={silent}", r"silent.jsonl, row 2: field 'continuation' is empty"),
        ("a={other}", r"lm-eval has no task a, and the fields of .*other.jsonl are of no known"),
        ("mmlu={other}", r"lm-eval has no task mmlu, and the fields of .* are of no known kind"),
        ("hellaswag={other}", r"other.jsonl does not hold what lm-eval's hellaswag reads: .*ctx_a"),
        ("boolq={unlabelled}", r"reads: item 2: None is none of its 2 choices"),
        ("boolq={third}", r"reads: item 2: 2 is none of its 2 choices"),
        ("wikitext={page}", r"wikitext has no score by item .*: wikitext report word_perplexity"),
        ("arc_easy={null}", r"null.jsonl does not hold what lm-eval's arc_easy reads: item 2: "),
    ],
)
def test_unusable_tasks_are_refused(
    small: Asked, rows: Callable[..., str], word: str, message: str
) -> None:
    lacking = {key: value for key, value in choice(1).items() if key != "gold"}
    spoken = {"context": "a", "continuation": "b"}
    asked = {"passage": "a", "question": "b", "label": 1}
    files = {
        "good": [choice(0)],
        "nothing": [],
        "lacking": [choice(0), lacking],
        "beyond": [choice(0, gold=7)],
        "single": [choice(0, choices=["one"])],
        "torn": [choice(0, choices=["\ud800", "b", "c"])],
        "silent": [spoken, {**spoken, "continuation": " "}],
        "other": [{"prompt": "a"}],
        "unlabelled": [asked, {**asked, "label": None}],
        "third": [asked, {**asked, "label": 2}],
        "page": [{"page": "some words of a page"}],
        "null": [lm_evals_own(choice(0)), {**lm_evals_own(choice(0)), "answerKey": None}],
    }
    paths = {name: rows(*content, name=f"{name}.jsonl") for name, content in files.items()}
    with pytest.raises(UserError, match=message) as raised:
        small.run(word.format(**paths))
    assert "\n" not in str(raised.value)
