"""`neftune-dist evaluate`: losses, answers and their statistics, abilities, judged quality.

Puts the parts together: what can be refused is refused before the model is read, what may fail late
comes last, and each part is written and told as soon as it is there. Every rank holds the whole
model, which must fit one device; documents and prompts are shared out, and the figures are those of
one process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from neftune_dist.config import UserError, user_path
from neftune_dist.data.dataset import Dataset, prepare
from neftune_dist.data.errors import BadRow
from neftune_dist.data.split import sample_documents
from neftune_dist.distributed.outcome import EXIT_DONE, EXIT_STOPPED
from neftune_dist.distributed.world import Stopped, StopSignal, World
from neftune_dist.evaluation import text_statistics
from neftune_dist.evaluation.answers import answer_all, remove_partial
from neftune_dist.evaluation.instructions import (
    HELD_OUT,
    Instruction,
    checkable,
    held_out_instructions,
    read_instructions,
)
from neftune_dist.evaluation.judge import compare
from neftune_dist.evaluation.losses import Losses, document_losses
from neftune_dist.evaluation.results import Results, told
from neftune_dist.evaluation.target import Subject, open_subject
from neftune_dist.evaluation.tasks import TaskWord, read_words, run_tasks
from neftune_dist.evaluation.win_rate import pair, read_answers, win_rate


def evaluate(
    name: str | Path,
    *,
    step: int | None = None,
    config_file: str | Path | None = None,
    settings: Sequence[str] = (),
    output: Path | None = None,
) -> int:
    """Evaluate a subject (see `open_subject`) into a folder; the exit code. Call it on every rank.

    Args:
        output: default: `evaluations/step_00000020` in the run's directory.

    Raises:
        UserError: nothing to evaluate, or a part that cannot be had; those before it are written.
    """
    stop = StopSignal()
    world = World(stop)
    try:
        with stop.at_once():
            subject = world.local_rank_zero_first(
                lambda: open_subject(
                    name,
                    step=step,
                    config_file=config_file,
                    settings=settings,
                    device=world.device,
                    part=(world.rank, world.size),
                )
            )
            evaluation = _Evaluation(subject, output, world)
            try:
                evaluation.run()
            finally:
                evaluation.results.close()
        return EXIT_DONE
    except Stopped:
        world.tell_stopped()
        world.log("stopped; the same command continues")
        return EXIT_STOPPED
    finally:
        world.close()
        stop.ignore()


class _Evaluation:
    """One call. Its methods are collectives of all ranks."""

    def __init__(self, subject: Subject, output: Path | None, world: World) -> None:
        self.subject, self.config, self.world = subject, subject.config, world
        evaluate, data = self.config.evaluate, self.config.data
        self.dataset: Dataset | None = None
        with world.agree():
            self.folder = output or _default_folder(subject)
            asked = evaluate.instructions not in (None, HELD_OUT)
            if not (data.holds_out or evaluate.train_documents or asked or evaluate.tasks):
                raise UserError(
                    f"There is nothing to evaluate {subject.name} on: set data.num_held_out, "
                    "evaluate.train_documents, evaluate.instructions=FILE or evaluate.tasks."
                )
            self.tasks = read_words(evaluate.tasks, evaluate.max_task_items)
        if data.holds_out or evaluate.train_documents:
            tokenizer = subject.tokenizer
            self.dataset = world.local_rank_zero_first(lambda: prepare(data, tokenizer, world.log))
        with world.agree():
            self.instructions = self._instructions()
            self.prompts = self._prompts()
            self.theirs = self._answers_to_beat()
        self.results = Results(self.folder, subject, world)

    def run(self) -> None:
        """All parts that are asked for."""
        self.world.log(f"evaluate: {self.subject.name}, into {self.folder}")
        if self.dataset is not None:
            self._losses(self.dataset)
        if self.prompts:
            self._answers()
        if self.tasks:
            self._tasks(self.tasks)
        if self.theirs:
            self._judge(self.theirs)

    def _instructions(self) -> list[Instruction]:
        name, number = self.config.evaluate.instructions, self.config.evaluate.max_instructions
        if name is None:
            return []
        if name == HELD_OUT:
            return held_out_instructions(self.dataset, number) if self.dataset else []
        found, of_all = read_instructions(name, number)
        if len(found) < of_all:
            self.world.log(
                f"answers: to the first {len(found)} of {of_all} instructions "
                "(evaluate.max_instructions)"
            )
        if any(each.conversation.num_left_out for each in found):
            self.world.log("answers: of several turns, to the first")
        return found

    def _prompts(self) -> list[list[int]]:
        """Of the instructions, tokens."""
        prompts = []
        if self.instructions:
            text_statistics.check_installed()
        for i, instruction in enumerate(self.instructions):
            try:
                prompts.append(self.subject.template.prompt_ids(instruction.conversation))
            except BadRow as error:
                raise UserError(f"Instruction {i + 1} cannot be asked: {error}.") from error
        return prompts

    def _answers_to_beat(self) -> list[dict[str, Any]]:
        reference = self.config.judge.reference
        if reference is None:
            return []
        if not self.instructions:
            raise UserError(
                f"judge.reference={reference} has no effect without instructions to answer."
            )
        theirs = read_answers(user_path(reference, "judge.reference"))
        # Whether they go together shows before hours of answering.
        pair([{"instruction": each.text} for each in self.instructions], theirs)
        return theirs

    def _load(self) -> Any:
        with self.world.agree():
            return self.subject.model

    def _has(self, part: str, settings: dict[str, Any]) -> bool:
        if not self.results.has(part, settings):
            return False
        self.world.log(f"{part}: there from before")
        self._tell(part)
        return True

    def _put(
        self, part: str, settings: dict[str, Any], figures: dict[str, Any], items: dict[str, Any]
    ) -> None:
        with self.world.agree():
            if self.world.is_first:
                self.results.put(part, settings, figures, items)
        self._tell(part)

    def _tell(self, part: str) -> None:
        for line in told(part, self.results.summary[part]) if self.world.is_first else ():
            self.world.log(line)

    def _losses(self, dataset: Dataset) -> None:
        evaluate, size = self.config.evaluate, len(dataset.held_out)
        with self.world.agree():
            chosen = {
                "held_out": sample_documents(dataset.held_out, evaluate.max_documents or size),
                "train": sample_documents(dataset.train, evaluate.train_documents),
            }
        numbers = {part: len(indices) for part, indices in chosen.items()}
        noise = [asdict(self.config.noise), self.config.noise_seed]
        settings = {
            "documents": dataset.fingerprint,
            **numbers,
            "model.dtype": self.config.model.dtype,
            "noise": noise if numbers["train"] else None,
        }
        if self._has("losses", settings):
            return
        model = self._load()

        def taken(what: str, part: str, noisy: bool = False) -> Losses | None:
            if not numbers[part]:
                return None
            return document_losses(
                model,
                dataset.held_out if part == "held_out" else dataset.train,
                chosen[part],
                self.config,
                self.world,
                noisy=noisy,
                progress=partial(self._progress, what),
            )

        held_out = taken("held-out loss", "held_out")
        train = taken("training loss", "train")
        noisy = taken("training loss with noise", "train", noisy=True)
        named = {"held_out": held_out, "train": train, "train_noisy": noisy}
        items = {name: losses.items() for name, losses in named.items() if losses}
        self._put("losses", settings, _loss_figures(held_out, train, noisy), items)

    def _progress(self, what: str, line: str) -> None:
        self.world.log(f"{what}: {line}")

    def _answers(self) -> None:
        evaluate, folder = self.config.evaluate, self.folder
        settings = {
            "prompts": _digest([self.prompts, [each.reference for each in self.instructions]]),
            "evaluate.max_new_tokens": evaluate.max_new_tokens,
            "evaluate.repetition_penalty": evaluate.repetition_penalty,
            "model.dtype": self.config.model.dtype,
        }
        self.results.begin_answers(settings)
        if self._has("answers", settings):
            if self.world.is_first:
                remove_partial(folder)
            return
        self._load()
        checked = evaluate.instructions == HELD_OUT and checkable(self.config)
        rows = answer_all(
            self.subject, self.instructions, self.prompts, folder, self.world, checked=checked
        )
        figures: dict[str, Any] = {}
        values: dict[str, Any] = {}
        with self.world.agree():
            if self.world.is_first:
                self.results.put_answers(rows)
                values = text_statistics.per_answer(rows)
                right = [row["correct"] for row in rows if row["correct"] is not None]
                figures = {
                    "num": len(rows),
                    "exact_match": sum(right) / len(right) if right else None,
                    **text_statistics.statistics(rows, values),
                }
        self._put("answers", settings, figures, {"answers": values})
        if self.world.is_first:
            remove_partial(folder)

    def _tasks(self, words: list[TaskWord]) -> None:
        evaluate = self.config.evaluate
        settings = {
            "tasks": _digest([asdict(word) for word in words]),
            "evaluate.max_task_items": evaluate.max_task_items,
            "model.dtype": self.config.model.dtype,
        }
        if self._has("tasks", settings):
            return
        model, tokenizer = self._load(), self.subject.tokenizer
        with self.world.agree():
            found = run_tasks(model, tokenizer, evaluate, self.world.log, self.world)
        items = {name: result.correct for name, result in found.items()}
        figures = {name: asdict(result) for name, result in found.items()}
        for result in figures.values():
            del result["correct"]
        self._put("tasks", settings, figures, {"tasks": items})

    def _judge(self, theirs: list[dict[str, Any]]) -> None:
        """Always anew: what was asked of the judge before is in the folder, and costs nothing."""
        figures: dict[str, Any] = {}
        items: dict[str, Any] = {}
        with self.world.agree():
            if self.world.is_first:
                ours = self.results.read("answers.json")
                judgements = compare(ours, theirs, self.config.judge, self.folder, self.world.log)
                figures = win_rate(judgements).to_dict()
                items = {"judge": [each.preference for each in judgements]}
        self._put("judge", {"judge.reference": self.config.judge.reference}, figures, items)


def _default_folder(subject: Subject) -> Path:
    if subject.run_dir is None or subject.checkpoint is None:
        raise UserError(f"{subject.name} is no run: say with --output DIR where its results go.")
    return subject.run_dir / "evaluations" / subject.checkpoint.folder.name


def _loss_figures(
    held_out: Losses | None, train: Losses | None, noisy: Losses | None
) -> dict[str, Any]:
    return {
        "held_out_loss": held_out and held_out.mean,
        "perplexity": held_out and held_out.perplexity,
        "num_documents": len(held_out.sums) if held_out else 0,
        "num_supervised_tokens": sum(held_out.num_tokens) if held_out else 0,
        "train_loss": train and train.mean,
        "train_loss_noisy": noisy and noisy.mean,
        "num_train_documents": len(train.sums) if train else 0,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:24]
