"""Abilities kept: lm-eval's tasks, from the hub or from files, for a model that is in memory.

Owns what `evaluate.tasks` may say, which rows of a local file are which kind of task, and what
becomes of the scores. lm-eval itself makes the prompts, cuts and tokenises them and scores, local
files too (`evaluate.harness`). No row is left out: items must stay aligned over the runs of a
study.

A word is the name of a task, group or tag of lm-eval, with the shots and the metric of the Open LLM
Leaderboard where `PUBLISHED` has it, else with lm-eval's own; or NAME=FILE, without shots, since a
file holds no examples beside its items. Of a file's rows, the fields tell the kind:

    query, choices, gold        the choice that is likeliest behind the query; a query that begins
                                with "Question:" is asked as lm-eval asks: "\\nAnswer:" behind it
    context, continuation       whether greedy decoding gives the continuation (LAMBADA)
    Question, Correct Answers,  TruthfulQA's own table: mc2 (mc1 offers some of the wrong answers
    Incorrect Answers           only, and the table does not say which)
    any other                   those that lm-eval's task of that name reads
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

from neftune_dist.config import EvaluateConfig, SourceConfig, UserError, split_list
from neftune_dist.data.errors import BadRow, type_name
from neftune_dist.data.sources import open_source
from neftune_dist.distributed.world import World

_KEY = "evaluate.tasks"
Row = dict[str, Any]


class Published(NamedTuple):
    """How the Open LLM Leaderboard (its first version; IFEval: its second) asks a task of lm-eval,
    and the metric that it reports."""

    task: str
    num_shots: int
    metric: str


PUBLISHED = {
    "arc": Published("arc_challenge", 25, "acc_norm"),
    "arc_challenge": Published("arc_challenge", 25, "acc_norm"),
    "hellaswag": Published("hellaswag", 10, "acc_norm"),
    "mmlu": Published("mmlu", 5, "acc"),
    "truthfulqa": Published("truthfulqa_mc2", 0, "acc"),
    "truthfulqa_mc2": Published("truthfulqa_mc2", 0, "acc"),
    "ifeval": Published("ifeval", 0, "prompt_level_strict_acc"),
}


@dataclass(frozen=True)
class TaskResult:
    """How a model did in one task.

    accuracy: mean of `correct`. standard_error: of that mean over items; 0 for a single one.
    correct: by item, in the task's order, which is the same in every run: 1 or 0; for TruthfulQA's
        mc2 the share of probability that true answers get.
    metric: lm-eval's name of it. others: lm-eval's other metrics and, of a group such as MMLU, the
        accuracy of each task in it (`accuracy` is the mean over all items).
    num_truncated: prompts longer than the model can read, cut on the left, as lm-eval does.
    """

    accuracy: float
    standard_error: float
    num_items: int
    correct: list[float]
    metric: str
    num_shots: int
    num_truncated: int
    others: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, correct: list[float], **about: Any) -> TaskResult:
        """The result of these items."""
        spread = statistics.stdev(correct) if len(correct) > 1 else 0.0
        return cls(
            accuracy=statistics.fmean(correct),
            standard_error=spread / len(correct) ** 0.5,
            num_items=len(correct),
            correct=[int(each) if each in (0, 1) else float(each) for each in correct],
            **about,
        )


@dataclass(frozen=True)
class TaskWord:
    """One word of `evaluate.tasks`.

    name: under which its result is told. task: lm-eval's name, which rows of a known kind need not
        have. num_shots, metric: None: lm-eval's own.
    rows: of a local file, as `settings` or lm-eval's task read them. settings: of a task that
        lm-eval does not have, in its own terms; None: lm-eval has it.
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
    config: EvaluateConfig,
    log: Callable[[str], None],
    world: World | None = None,
) -> dict[str, TaskResult]:
    """What `config.tasks` names, by name.

    Args:
        model: a causal language model of Hugging Face on its device, in evaluation mode.
        world: the ranks that hold a copy of the model each; they share the work, all call this and
            all get the results. None: this process alone.

    Raises:
        UserError: lm-eval is missing or knows no such task, a task's data cannot be had, a row of a
            file cannot be used, or an answer is longer than the model can read.
    """
    words = read_words(config.tasks, config.max_task_items)
    if not words:
        return {}
    try:
        from neftune_dist.evaluation.lm_eval_adapter import Harness
    except ImportError as error:
        raise UserError(
            f"{_KEY} needs the package {error.name or 'lm_eval'}: install neftune-dist[tasks]."
        ) from error
    harness = Harness(model, tokenizer, config.batch_size, log, world)
    loaded = [(word, harness.load(word)) for word in words]  # all, before the first takes its hours
    results = {}
    for word, tasks in loaded:
        result = harness.run(word, tasks, config.max_task_items)
        cut = f", {result.num_truncated} prompts cut on the left" if result.num_truncated else ""
        log(
            f"evaluate: {word.name} {result.metric} {result.accuracy:.4f} "
            f"± {result.standard_error:.4f} of {result.num_items} items, "
            f"{result.num_shots}-shot{cut}"
        )
        results[word.name] = result
    return results


def read_words(text: str | None, max_items: int = 0) -> list[TaskWord]:
    """The words of `evaluate.tasks`, files read as far as they are asked for (0: whole). Raises
    `UserError` where a file or a row of it cannot be used; whether lm-eval knows a name is seen
    later."""
    words: dict[str, TaskWord] = {}
    for text_of_word in split_list(text):
        name, is_file, path = (part.strip() for part in text_of_word.partition("="))
        if not name or (is_file and not path) or (not is_file and "/" in name):
            raise UserError(
                f"{_KEY}={text_of_word} is neither a task of lm-eval nor of the form NAME=FILE."
            )
        if name in words:
            raise UserError(f"{_KEY} names {name} twice.")
        words[name] = _of_file(name, path, max_items) if is_file else _of_lm_eval(name)
    return list(words.values())


def _of_lm_eval(name: str) -> TaskWord:
    published = PUBLISHED.get(name)
    return TaskWord(name, *published) if published else TaskWord(name, name)


def _of_file(name: str, path: str, max_items: int) -> TaskWord:
    source = open_source(SourceConfig(source=path), _KEY)
    rows: list[Row] = []
    kind = _OF_LM_EVAL
    for place, row in islice(source.rows, max_items or None):
        try:
            if isinstance(row, BadRow):
                raise row
            if not rows:
                kind = next((each for each in _KINDS if all(f in row for f in each.fields)), kind)
            needed = kind.fields or tuple(rows[0] if rows else row)
            missing = next((each for each in needed if each not in row), None)
            if missing is not None:
                raise BadRow(f"field '{missing}' is missing")
            rows.append(kind.read(row))
        except BadRow as error:
            raise UserError(f"{_KEY}: {place} of {source.name} cannot be used: {error}.") from error
    if not rows:
        raise UserError(f"{_KEY}: {source.name} holds no item.")
    task, _, metric = PUBLISHED.get(name, (name, 0, None))
    if kind.metrics and metric not in kind.metrics:
        metric = kind.metrics[0]
    return TaskWord(name, kind.task or task, 0, metric, rows, kind.settings, source.name)


@dataclass(frozen=True)
class _Kind:
    """Rows of a file. fields: by which they are told. read: checks a row and gives what the task
    reads, raises `BadRow`. metrics: the first is told where the leaderboard has no other. settings,
    task: as in `TaskWord`."""

    fields: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]
    metrics: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    task: str | None = None


def _choice_row(row: Mapping[str, Any]) -> Row:
    query, choices, gold = _text(row, "query").rstrip(), row["choices"], row["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise BadRow("field 'choices' is no list of two or more")
    if not all(isinstance(each, str) and each.strip() for each in choices):
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
        key: [each.strip() for each in _text(row, key).split(";") if each.strip()]
        for key in ("Correct Answers", "Incorrect Answers")
    }
    empty = next((key for key, each in answers.items() if not each), None)
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


def _metrics(**aggregations: str) -> list[dict[str, Any]]:
    return [
        {"metric": name, "aggregation": each, "higher_is_better": each == "mean"}
        for name, each in aggregations.items()
    ]


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
            "metric_list": _metrics(acc="mean", acc_norm="mean"),
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
            "metric_list": _metrics(acc="mean", perplexity="perplexity"),
        },
    ),
    _Kind(
        ("Question", "Correct Answers", "Incorrect Answers"),
        _truthful_row,
        ("acc",),
        task="truthfulqa_mc2",
    ),
)
