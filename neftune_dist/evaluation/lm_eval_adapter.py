"""lm-eval for a model in memory: the only module that imports it, loaded when tasks are asked for.

lm-eval decides every score: prompts, examples, tokenization at the border between context and
answer, BOS, truncation on the left. Added here: ranks share the requests, progress is logged, and
mistakes that lm-eval ignores are refused.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import io
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from statistics import fmean, stdev
from typing import Any

import datasets
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from neftune_dist.compat.lm_eval import load_yaml
from neftune_dist.config import UserError
from neftune_dist.distributed.world import World
from neftune_dist.evaluation.tasks import TaskWord
from neftune_dist.model.families import answers_in_batches
from neftune_dist.system.text import first_line

_FEWSHOT_SEED = 1234  # lm-eval's own
_LOG_EVERY_SECONDS = 15.0
_SPLIT = "test"
_NO_SPLITS = dict.fromkeys(("training_split", "validation_split", "fewshot_split"))


def load(word: TaskWord) -> dict[str, Task]:
    """Load lm-eval's tasks of a word, by name: more than one where it names a group or a tag.

    Raises:
        UserError: lm-eval knows none, its data or its packages are missing, or it has no score by
            item.
    """
    tasks = _loaded(word)
    for task in tasks.values():
        if not word.metric and mean not in task.aggregation().values():
            raise _unscored(word.name, tasks, task.aggregation())
    return tasks


def _loaded(word: TaskWord) -> dict[str, Task]:
    if word.settings is not None:
        return {word.name: ConfigurableTask(config=_local(word, word.settings))}
    check_known(word)
    try:
        with _quietly():
            if word.rows is None:
                tasks: dict[str, Task] = _manager().load([word.task])["tasks"]
                return dict(sorted(tasks.items()))
            settings = load_yaml(_manager().task_index[word.task].yaml_path)
            return {word.name: _checked(ConfigurableTask(config=_local(word, settings)))}
    except ImportError as error:
        raise UserError(
            f"evaluate.tasks: {word.task} needs the package {error.name}: install it."
        ) from error
    except Exception as error:  # of the hub's clients, of lm-eval's templates, of anything
        reason = first_line(error)
        if isinstance(error, KeyError):
            reason = f"field {reason} is missing"
        raise UserError(
            f"evaluate.tasks: {word.file} does not hold what lm-eval's {word.task} reads: {reason}."
            if word.file
            else f"evaluate.tasks: the items of {word.task} could not be loaded from the hub: "
            f"{reason}; a local file may take their place: {word.name}=FILE."
        ) from error


def check_known(word: TaskWord) -> None:
    """Refuse a task that lm-eval does not have, and of which no file says all. Raises
    `UserError`."""
    if word.settings is not None:
        return
    known = _manager().all_tasks if word.rows is None else _manager().all_subtasks
    if word.task not in known:
        near = difflib.get_close_matches(word.task, known, 1)
        hint = f"; did you mean {near[0]}?" if near else "."
        about = f", and the fields of {word.file} are of no known kind" if word.file else ""
        raise UserError(f"evaluate.tasks: lm-eval has no task {word.task}{about}{hint}")


def run(lm: TaskModel, word: TaskWord, tasks: dict[str, Task], max_items: int) -> dict[str, Any]:
    """Run a word's tasks; return their figures and the values of their items on every rank.

    - `accuracy`, `standard_error`: the mean of `correct`, and its error over items;
    - `correct`: by item, in the task's order, which is the same in every run: 1 or 0; for
      TruthfulQA's mc2 the share of probability of the true answers;
    - `num_items`; `metric`: lm-eval's name of it; `num_shots`: examples in front of each item;
    - `num_truncated`: prompts longer than the model's context, truncated on the left;
    - `others`: lm-eval's other metrics; for a group such as MMLU the accuracy of each task in it.

    Args:
        lm: the model.
        word: names the result, and its shots and metric where they are not lm-eval's.
        tasks: of `load`.
        max_items: of each task; 0: all.
    """
    for task in tasks.values():
        shots = task.get_config("num_fewshot") if word.num_shots is None else word.num_shots
        task.set_config("num_fewshot", shots or 0)
        task.set_fewshot_seed(_FEWSHOT_SEED)
    lm.begin(word.name)
    with _quietly():
        found: Any = evaluate(lm, {"tasks": tasks}, limit=max_items or None, bootstrap_iters=0)
    by_task = {name: _values(found["samples"][name]) for name in tasks}
    metric = word.metric or _averaged(word.name, tasks, by_task)
    correct = {name: values[metric] for name, values in by_task.items()}
    if len(tasks) == 1:
        [(name, values)] = by_task.items()
        totals = {k: tasks[name].aggregation()[k](of) for k, of in values.items() if k != metric}
        others = {key: total for key, total in totals.items() if isinstance(total, float | int)}
    else:
        others = {name: fmean(of_items) for name, of_items in correct.items()}
    items = [value for of_items in correct.values() for value in of_items]
    return {
        "accuracy": fmean(items),
        "standard_error": stdev(items) / len(items) ** 0.5 if len(items) > 1 else 0.0,
        "num_items": len(items),
        "correct": [int(value) if value in (0, 1) else float(value) for value in items],
        "metric": metric,
        "num_shots": max(task.get_config("num_fewshot") for task in tasks.values()),
        "num_truncated": lm.num_truncated,
        "others": others,
    }


@cache
def _manager() -> TaskManager:
    """lm-eval's index of all its tasks; reading it takes seconds."""
    return TaskManager()


def _local(word: TaskWord, settings: Any) -> dict[str, Any]:
    """The settings of a task whose items are a file's rows."""
    items = datasets.Dataset.from_list(word.rows)
    own = {"task": word.name, "custom_dataset": lambda **_: {_SPLIT: items}}
    nowhere = dict.fromkeys(("dataset_path", "dataset_name", "dataset_kwargs", "metadata"))
    kept = {key: value for key, value in settings.items() if key not in ("tag", "group")}
    return {**kept, **_NO_SPLITS, **nowhere, **own, "test_split": _SPLIT, "num_fewshot": 0}


def _checked(task: Any) -> Task:
    """Check that every item of a task makes a prompt and an answer; return the task. Raises
    `ValueError` that names the item."""
    for number, item in enumerate(task.eval_docs, 1):
        try:
            text, target = task.doc_to_text(item), task.doc_to_target(item)
            if task.config.doc_to_choice is not None:
                gold, choices = text if task.multiple_input else target, task.doc_to_choice(item)
                # lm-eval would count an item without a right choice as a wrong answer.
                for right in gold if isinstance(gold, list) else [gold]:
                    if right not in choices and right not in range(len(choices)):
                        raise ValueError(f"{right!r} is none of its {len(choices)} choices")
        except Exception as error:  # a template is a program, and can fail in any way
            raise ValueError(f"item {number}: {error}") from error
    return task  # type: ignore[no-any-return]


def _values(samples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The items' values by metric, in the task's order; where lm-eval reads an answer in several
    ways (filters), by the first."""
    first = samples[0]["filter"]
    kept = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    values = defaultdict(list)
    for sample in kept:
        for metric in sample["metrics"]:
            values[metric].append(sample[metric])
    return dict(values)


def _averaged(name: str, tasks: dict[str, Task], by_task: dict[str, dict[str, list[Any]]]) -> str:
    """The first metric that all tasks have, that gives every item one number, and that is their
    mean: the items of a perplexity are log-likelihoods."""
    first, *rest = by_task.values()
    aggregations = next(iter(tasks.values())).aggregation()
    for metric, values in first.items():
        is_number = all(isinstance(value, float | int) for value in values)
        if is_number and aggregations[metric] is mean and all(metric in of for of in rest):
            return metric
    raise _unscored(name, tasks, first)


def _unscored(name: str, tasks: Iterable[str], metrics: Iterable[str]) -> UserError:
    return UserError(
        f"evaluate.tasks: {name} has no score by item that could be compared: "
        f"{', '.join(tasks)} report {', '.join(metrics)}."
    )


class TaskModel(HFLM):
    """lm-eval's model with its requests shared: rank r answers requests r, r + world size, ..., and
    all ranks gather all answers, so that lm-eval runs alike on each.

    Attributes:
        num_truncated: prompts of the current task that were truncated, over all ranks.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, world: World) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        own = copy.deepcopy(tokenizer)  # HFLM gives one without a padding token another
        # HFLM pads prompts on the left.
        size = batch_size if answers_in_batches(model.config) else 1
        super().__init__(pretrained=model, tokenizer=own, batch_size=size)
        self._world = world
        self.begin("")

    def begin(self, name: str) -> None:
        """Begin the requests of another task."""
        self._name, self.num_truncated = name, 0
        self._num_done, self._logged = 0, time.monotonic()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Any]:
        return self._shared(super().loglikelihood, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._shared(super().generate_until, requests)

    def _shared(self, run: Any, requests: list[Instance]) -> list[Any]:
        rank, size = self._world.rank, self._world.size
        if size == 1:
            return self._answers(run, requests)
        answers: list[Any] = []
        before = self.num_truncated  # over all ranks, of requests of another kind
        with self._world.agree():  # an error on one rank ends all
            if own := requests[rank::size]:
                answers = self._answers(run, own)
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, (answers, self.num_truncated - before))
        self.num_truncated = before + sum(count for _, count in parts)
        return [parts[i % size][0][i // size] for i in range(len(requests))]

    def _answers(self, run: Any, requests: list[Instance]) -> list[Any]:
        try:
            return list(run(requests, disable_tqdm=True))
        except AssertionError as error:  # by which lm-eval refuses, say, a model that is too short
            raise UserError(f"evaluate.tasks: {self._name}: lm-eval says: {error}") from error

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for (_, answer), context_ids, answer_ids in requests:
            if not answer_ids:
                raise UserError(
                    f"evaluate.tasks: {self._name}: the tokenizer makes no token of the answer "
                    f"{answer[:40]!r}."
                )
            if len(answer_ids) > self.max_length:
                raise UserError(
                    f"evaluate.tasks: {self._name}: an answer of {len(answer_ids)} tokens is "
                    f"longer than the {self.max_length} that the model reads: {answer[:40]!r}..."
                )
            # The last token is predicted, not read.
            self.num_truncated += len(context_ids) + len(answer_ids) > self.max_length + 1
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self, strings: Any, *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> Any:
        if left_truncate_len:  # of prompts to be continued
            lengths = [len(self.tok_encode(text)) for text in strings]
            self.num_truncated += sum(length > left_truncate_len for length in lengths)
        return super().tok_batch_encode(
            strings, *args, left_truncate_len=left_truncate_len, **kwargs
        )

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        self._progress(len(inps))
        return super()._model_call(inps, *args, **kwargs)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        self._progress(len(context))
        return super()._model_generate(context, *args, **kwargs)

    def _progress(self, num_texts: int) -> None:
        if time.monotonic() - self._logged > _LOG_EVERY_SECONDS:
            self._world.log(f"evaluate: {self._name}, {self._num_done} texts read on this rank")
            self._logged = time.monotonic()
        self._num_done += num_texts


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Discard lm-eval's progress bars, which cannot be turned off."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
