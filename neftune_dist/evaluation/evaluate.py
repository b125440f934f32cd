"""`neftune-dist evaluate`: losses, answers and their statistics, abilities, judged quality.

Mistakes are refused before the model is loaded; each part is written and logged as soon as it is
complete. Every rank holds the whole model, which must fit on one device. Ranks share the documents
and prompts; the figures do not depend on their number.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from neftune_dist.config import HELD_OUT, UserError, check_evaluation_packages
from neftune_dist.data.dataset import Dataset, prepare
from neftune_dist.data.instructions import (
    Instruction,
    checkable,
    held_out_instructions,
    prompt_ids,
    read_instructions,
)
from neftune_dist.data.split import sample_documents
from neftune_dist.distributed.outcome import EXIT_DONE
from neftune_dist.distributed.signals import StopSignal
from neftune_dist.distributed.world import World, run_among_ranks
from neftune_dist.evaluation import text_statistics
from neftune_dist.evaluation.answers import answer_all, remove_partial
from neftune_dist.evaluation.journal import digest
from neftune_dist.evaluation.judge import compare
from neftune_dist.evaluation.losses import Items, document_losses, mean_loss
from neftune_dist.evaluation.results import Found, Results, read_results
from neftune_dist.evaluation.target import EvaluationTarget, open_target
from neftune_dist.evaluation.tasks import FINISHED, TaskWord, check_known, read_words, run_tasks
from neftune_dist.evaluation.win_rate import pair, read_answers, win_rate
from neftune_dist.training.held_out import held_out_figures


def evaluate(name: str | Path, output: Path | None, stop: StopSignal, **options: Any) -> int:
    """Evaluate a model and return the exit code. Call it on every rank.

    Args:
        name: what `open_target` opens.
        output: results folder; None: `evaluations/step_00000020` in the run's directory.
        stop: requests to stop.
        options: of `open_target`: step, config_file, settings.

    Raises:
        UserError: there is nothing to evaluate, or a part failed; the parts before it are written.
    """

    def work(world: World, stop: StopSignal) -> int:
        place: dict[str, Any] = {"device": world.device, "part": (world.rank, world.size)}
        with stop.at_once():
            target = world.local_rank_zero_first(lambda: open_target(name, **place, **options))
            evaluation = _Evaluation(target, output, world)
            with closing(evaluation.results):
                evaluation.run()
        return EXIT_DONE

    return run_among_ranks(work, "stopped; the same command continues", stop)


class _Evaluation:
    """The parts of one evaluation. Its methods are collectives of all ranks."""

    def __init__(self, target: EvaluationTarget, output: Path | None, world: World) -> None:
        self.target, self.config, self.world = target, target.config, world
        evaluate, data = self.config.evaluate, self.config.data
        self.dataset: Dataset | None = None
        with world.agree():
            check_evaluation_packages(self.config)
            self.folder = output or _default_folder(target)
            asked = evaluate.instructions not in (None, HELD_OUT)
            if not (data.holds_out or evaluate.train_documents or asked or evaluate.tasks):
                raise UserError(
                    f"There is nothing to evaluate {target.name} on: set data.num_held_out, "
                    "evaluate.train_documents, evaluate.instructions=FILE or evaluate.tasks."
                )
            self.tasks = read_words(evaluate.tasks, evaluate.max_task_items)
        if data.holds_out or evaluate.train_documents:
            tokenizer = target.tokenizer
            self.dataset = world.local_rank_zero_first(lambda: prepare(data, tokenizer, world.log))
        with world.agree():
            self.instructions = self._instructions()
            self.prompts: list[list[int]] = []
            if self.instructions:
                self.prompts = prompt_ids(self.instructions, target.template, "Instruction")
            self.theirs = self._answers_to_beat()
        self.results = Results(self.folder, target, world)

    def run(self) -> None:
        """Make all parts that are asked for."""
        self.world.log(f"evaluate: {self.target.name}, into {self.folder}")
        with self.world.agree():
            if self.world.is_first and self.results.summary["tasks"] is None:
                check_known(self.tasks)
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
                f"answers: the first {len(found)} of {of_all} instructions "
                "(evaluate.max_instructions)"
            )
        if any(i.conversation.num_left_out for i in found):
            self.world.log("answers: only the first turn of a conversation is asked")
        return found

    def _answers_to_beat(self) -> list[dict[str, Any]]:
        reference = self.config.judge.reference
        if reference is None:
            return []
        if not self.instructions:
            raise UserError(
                f"judge.reference={reference} has no effect without instructions to answer."
            )
        theirs = read_answers(reference)
        # A mismatch is refused before hours of answering.
        pair([{"instruction": i.text} for i in self.instructions], theirs)
        return theirs

    def _load(self) -> Any:
        with self.world.agree():
            return self.target.model

    def _losses(self, dataset: Dataset) -> None:
        config, world = self.config, self.world
        held_out, train = dataset.held_out, dataset.train
        with world.agree():
            of_held_out = sample_documents(held_out, config.evaluate.max_documents or len(held_out))
            of_train = sample_documents(train, config.evaluate.train_documents)
        settings = {
            "documents": dataset.fingerprint,
            "held_out": len(of_held_out),
            "train": len(of_train),
            "model.dtype": config.model.dtype,
            "noise": [asdict(config.noise), config.noise_seed] if len(of_train) else None,
        }

        def compute() -> Found:
            model = self._load()
            # Empty lists where there are none: an earlier evaluation's may have had some.
            items = {
                "held_out": document_losses(model, held_out, of_held_out, config, world),
                "train": document_losses(model, train, of_train, config, world),
                "train_noisy": document_losses(model, train, of_train, config, world, noisy=True),
            }
            return _loss_figures(items), items

        self.results.make("losses", settings, compute)

    def _answers(self) -> None:
        evaluate = self.config.evaluate
        settings = {
            "prompts": digest([self.prompts, [i.reference for i in self.instructions]]),
            "evaluate.max_new_tokens": evaluate.max_new_tokens,
            "evaluate.repetition_penalty": evaluate.repetition_penalty,
            "evaluate.samples": evaluate.samples,
            "evaluate.temperature": evaluate.temperature,
            "model.dtype": self.config.model.dtype,
        }
        self.results.begin_answers(settings)
        self.results.make("answers", settings, self._compute_answers)
        if self.world.is_first:
            remove_partial(self.folder)

    def _compute_answers(self) -> Found:
        self._load()
        checked = self.config.evaluate.instructions == HELD_OUT and checkable(self.config)
        rows = answer_all(
            self.target, self.instructions, self.prompts, self.folder, self.world, checked=checked
        )
        with self.world.agree():
            if not self.world.is_first:
                return {}, {}
            self.results.put_answers(rows)
            values = text_statistics.per_answer(rows)
            figures = text_statistics.statistics(rows, values)
        num, samples = len(self.instructions), self.config.evaluate.samples
        counts = {"num": num} if samples == 1 else {"num": num, "num_samples": samples}
        return {**counts, "exact_match": None, **figures}, {"answers": values}

    def _tasks(self, words: list[TaskWord]) -> None:
        evaluate = self.config.evaluate
        settings = {
            "tasks": digest([asdict(word) for word in words]),
            "evaluate.max_task_items": evaluate.max_task_items,
            "model.dtype": self.config.model.dtype,
        }

        def compute() -> Found:
            model, tokenizer, world = self._load(), self.target.tokenizer, self.world
            with world.agree():
                figures = run_tasks(model, tokenizer, words, evaluate, world, self.folder)
            return figures, {"tasks": {name: f.pop("correct") for name, f in figures.items()}}

        self.results.make("tasks", settings, compute)
        if self.world.is_first:
            (self.folder / FINISHED).unlink(missing_ok=True)

    def _judge(self, theirs: list[dict[str, Any]]) -> None:
        """Judge the answers, always again: replies are cached in the folder and cost nothing."""

        def compute() -> Found:
            with self.world.agree():
                if not self.world.is_first:
                    return {}, {}
                ours = read_results(self.folder)["answers"]
                judgements = compare(ours, theirs, self.config.judge, self.folder, self.world.log)
            return win_rate(judgements), {"judge": [j.preference for j in judgements]}

        settings = {"judge.reference": self.config.judge.reference}
        self.results.make("judge", settings, compute, keep=False)


def _default_folder(target: EvaluationTarget) -> Path:
    if target.run_dir is None or target.checkpoint is None:
        raise UserError(f"{target.name} is no run, so its results need a folder: --output DIR.")
    return target.run_dir / "evaluations" / target.checkpoint.folder.name


def _loss_figures(items: dict[str, Items]) -> dict[str, Any]:
    means = {name: mean_loss(of) if of else None for name, of in items.items()}
    held_out = items["held_out"]
    return {
        **held_out_figures(means["held_out"], len(held_out), sum(int(n) for _, n in held_out)),
        "train_loss": means["train"],
        "train_loss_noisy": means["train_noisy"],
        "num_train_documents": len(items["train"]),
    }
