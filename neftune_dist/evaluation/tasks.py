"""lm-eval's tasks, from the hub or from local files, for a model in memory.

Parses `evaluate.tasks` and recognises the kind of a local file's rows. lm-eval makes, truncates and
tokenises the prompts and scores the answers, of local files too (`lm_eval_adapter`). No row is left
out: items must stay aligned over the runs of a study.

A word is the name of a task, group or tag of lm-eval, with the shots and the metric of the Open LLM
Leaderboard where `PUBLISHED` has it, else with lm-eval's own; or NAME=FILE, without shots, since a
file holds no examples beside its items. The fields of a file's rows decide its kind:

    query, choices, gold        the choice that is likeliest after the query; a query that begins
                                with "Question:" is asked as lm-eval asks: "\\nAnswer:" after it
    context, continuation       whether greedy decoding gives the continuation (LAMBADA)
    Question, Correct Answers,  TruthfulQA's own table: mc2 (mc1 offers some of the wrong answers
    Incorrect Answers           only, and the table does not say which)
    any other                   those that lm-eval's task of that name reads
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neftune_dist.config import EvaluateConfig, UserError, split_list
from neftune_dist.data.errors import BadRow, type_name
from neftune_dist.data.sources import read_row_file
from neftune_dist.distributed.world import World
from neftune_dist.evaluation.journal import Journal, digest, read_rows

FINISHED = "tasks.jsonl"
_FINISHED_FORM = {"task": str, "result": {"correct": [float], "accuracy": float}}
_KEY = "evaluate.tasks"
_NAME = re.compile(r"[\w .+()-]+")  # lm-eval's, and what tables and plots show as it is
Row = dict[str, Any]


# How the Open LLM Leaderboard (its first version; IFEval: its second) asks a task: lm-eval's name,
# the number of examples in front of each item, and the metric that it reports.
PUBLISHED = {
    "arc": ("arc_challenge", 25, "acc_norm"),
    "arc_challenge": ("arc_challenge", 25, "acc_norm"),
    "hellaswag": ("hellaswag", 10, "acc_norm"),
    "mmlu": ("mmlu", 5, "acc"),
    "truthfulqa": ("truthfulqa_mc2", 0, "acc"),
    "truthfulqa_mc2": ("truthfulqa_mc2", 0, "acc"),
    "ifeval": ("ifeval", 0, "prompt_level_strict_acc"),
}


@dataclass(frozen=True)
class TaskWord:
    """One word of `evaluate.tasks`.

    Attributes:
        name: under which its result is reported.
        task: lm-eval's name; not needed for rows of a known kind.
        num_shots: None: lm-eval's own.
        metric: None: lm-eval's own.
        rows: of a local file, as `settings` or lm-eval's task read them.
        settings: an lm-eval configuration for a task that it does not have.
        file: the name of the local file.
    """

    name: str
    task: str
    num_shots: int | None = None
    metric: str | None = None
    rows: list[Row] | None = None
    settings: Mapping[str, Any] | None = None
    file: str = ""


def run_tasks(
    model: Any,
    tokenizer: Any,
    words: Sequence[TaskWord],
    config: EvaluateConfig,
    world: World,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Run tasks; return their results by name, as `lm_eval_adapter.run` gives them.

    Args:
        model: a causal language model of Hugging Face on its device, in evaluation mode.
        tokenizer: its tokenizer, which is not changed.
        words: of `read_words`.
        config: how many texts the model reads at once, and how many items of each task.
        world: the ranks that hold a copy of the model each; they share the work, all call this and
            all get the results.
        folder: keeps the result of every task that is finished, which a second call takes from
            there.

    Raises:
        UserError: lm-eval knows no such task or cannot load its data, or an answer is longer than
            the model can read.
    """
    from neftune_dist.evaluation import lm_eval_adapter as lm_eval

    max_items = config.max_task_items
    keys = {word.name: digest([asdict(word), max_items, str(model.dtype)]) for word in words}
    done = {row["task"]: row["result"] for row in read_rows(folder / FINISHED, _FINISHED_FORM)}
    left = [word for word in words if keys[word.name] not in done]
    if left != [*words]:
        world.log(f"tasks: {len(words) - len(left)} of {len(words)} kept from an earlier call")
    lm = lm_eval.TaskModel(model, tokenizer, config.batch_size, world)
    loaded = [(word, lm_eval.load(word)) for word in left]  # all, before the first takes its hours
    for word, tasks in loaded:
        # All ranks take part in it, so that by its end each has read the file, and none misses what
        # is added here.
        result = done[keys[word.name]] = lm_eval.run(lm, word, tasks, max_items)
        if world.is_first:
            Journal(folder / FINISHED).append([{"task": keys[word.name], "result": result}])
    return {word.name: done[keys[word.name]] for word in words}


def check_known(words: Sequence[TaskWord]) -> None:
    """Refuse names that lm-eval does not know, before what takes hours. Raises `UserError`."""
    for word in words:
        from neftune_dist.evaluation import lm_eval_adapter

        lm_eval_adapter.check_known(word)


def read_words(text: str | None, max_items: int = 0) -> list[TaskWord]:
    """The words of `evaluate.tasks`, files read as far as they are asked for (0: whole). Raises
    `UserError` where a file or a row of it cannot be used; see `check_known` for the names."""
    words: dict[str, TaskWord] = {}
    for text_of_word in split_list(text):
        name, is_file, path = (part.strip() for part in text_of_word.partition("="))
        if not _NAME.fullmatch(name) or (is_file and not path):
            raise UserError(
                f"{_KEY}={text_of_word} is neither a task of lm-eval nor of the form NAME=FILE, "
                "with a NAME of letters, digits, spaces and _ . + - ( )."
            )
        if name in words:
            raise UserError(f"{_KEY} names {name} twice.")
        if is_file:
            words[name] = _of_file(name, path, max_items)
        else:
            words[name] = TaskWord(name, *PUBLISHED.get(name, (name,)))
    return list(words.values())


def _of_file(name: str, path: str, max_items: int) -> TaskWord:
    kind: _Kind | None = None
    needed: tuple[str, ...] = ()

    def read(row: Mapping[str, Any]) -> Row:
        nonlocal kind, needed
        if kind is None:
            kind = next((k for k in _KINDS if all(f in row for f in k.fields)), _OF_LM_EVAL)
            needed = kind.fields or tuple(row)
        missing = next((field for field in needed if field not in row), None)
        if missing is not None:
            raise BadRow(f"field '{missing}' is missing")
        return kind.read(row)

    rows = read_row_file(path, _KEY, read, max_items)
    assert kind is not None
    task, _, metric = PUBLISHED.get(name, (name, 0, None))
    if kind.metrics and metric not in kind.metrics:
        metric = kind.metrics[0]
    return TaskWord(name, kind.task or task, 0, metric, rows, kind.settings, path)


@dataclass(frozen=True)
class _Kind:
    """A kind of local file.

    Attributes:
        fields: every row has them.
        read: checks a row and returns what the task reads; raises `BadRow`.
        metrics: the first is reported unless the leaderboard reports another of them.
        settings: see `TaskWord`.
        task: see `TaskWord`.
    """

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]
    metrics: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    task: str | None = None


def _choice_row(row: Mapping[str, Any]) -> Row:
    query, choices, gold = _text(row, "query").rstrip(), row["choices"], row["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadRow("field 'choices' is no list of two or more")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise BadRow("field 'choices' holds something that is no text, or an empty one")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise BadRow(f"field 'gold' is {gold!r}, not one of 0 to {len(choices) - 1}")
    if query.startswith("Question:") and not query.endswith("Answer:"):
        query += "\nAnswer:"
    return {"query": query, "choices": choices, "gold": gold}


def _continuation_row(row: Mapping[str, Any]) -> Row:
    context, continuation = _text(row, "context"), _text(row, "continuation")
    if not context[-1].isspace() and not continuation[0].isspace():
        continuation = " " + continuation
    return {"context": context, "continuation": continuation}


def _truthful_row(row: Mapping[str, Any]) -> Row:
    answers = {
        key: [answer.strip() for answer in _text(row, key).split(";") if answer.strip()]
        for key in ("Correct Answers", "Incorrect Answers")
    }
    empty = next((key for key, texts in answers.items() if not texts), None)
    if empty:
        raise BadRow(f"field '{empty}' is empty")
    right, wrong = answers.values()
    targets = {"choices": right + wrong, "labels": [1] * len(right) + [0] * len(wrong)}
    return {"question": _text(row, "Question").strip(), "mc2_targets": targets}


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise BadRow(f"field '{name}' is {type_name(value)}, not text")
    if not value.strip():
        raise BadRow(f"field '{name}' is empty")
    return value


_OF_LM_EVAL = _Kind((), dict)
_KINDS = (
    _Kind(
        ("query", "choices", "gold"),
        _choice_row,
        ("acc", "acc_norm"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "query",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
        },
    ),
    _Kind(
        ("context", "continuation"),
        _continuation_row,
        ("acc",),
        {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "continuation",
        },
    ),
    _Kind(
        ("Question", "Correct Answers", "Incorrect Answers"),
        _truthful_row,
        ("acc",),
        task="truthfulqa_mc2",
    ),
)
