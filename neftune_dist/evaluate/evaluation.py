"""`neftune-dist evaluate`: losses, answers and their statistics, abilities, judged quality.

Puts the parts together in an order in which what may fail late comes last, each written to the
folder as soon as it is there (`results`). Every rank holds the whole model, which must fit one
device; documents and prompts are shared out, and the figures are those of one process.
"""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from neftune_dist.attempt import EXIT_DONE, EXIT_STOPPED
from neftune_dist.config import UserError
from neftune_dist.data.corpus import Corpus, prepare
from neftune_dist.data.sources import BadRow
from neftune_dist.distributed import Stopped, StopSignal, World
from neftune_dist.evaluate import text
from neftune_dist.evaluate.answers import answer_all, remove_partial
from neftune_dist.evaluate.instructions import (
    HELD_OUT,
    Instruction,
    checkable,
    held_out_instructions,
    read_instructions,
)
from neftune_dist.evaluate.losses import Losses, document_losses
from neftune_dist.evaluate.results import Results
from neftune_dist.evaluate.subject import Subject, open_subject


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
            subject = world.in_turn(
                lambda: open_subject(
                    name,
                    step=step,
                    config_file=config_file,
                    settings=settings,
                    device=world.device,
                    part=(world.rank, world.size),
                )
            )
            _Evaluation(subject, output, world).run()
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
        self.corpus: Corpus | None = None
        self.instructions: list[Instruction] = []
        with world.agree():
            self.folder = output or _default_folder(subject)
            self._refuse_nothing()
        if self.config.data.holds_out or self.config.evaluate.train_documents:
            data, tokenizer = self.config.data, subject.tokenizer
            self.corpus = world.in_turn(lambda: prepare(data, tokenizer, world.log))
        with world.agree():
            self.prompts = self._ask()
        self.results = Results(self.folder, subject, world)

    def run(self) -> None:
        """All parts that are asked for."""
        self.world.log(f"evaluate: {self.subject.name}, into {self.folder}")
        if self.corpus is not None:
            self._losses(self.corpus)
        if self.prompts:
            self._answers()
        if self.world.is_first:
            for line in lines(self.results.summary):
                self.world.log(line)

    def _refuse_nothing(self) -> None:
        evaluate, data = self.config.evaluate, self.config.data
        asked = evaluate.instructions not in (None, HELD_OUT)
        if not (data.holds_out or evaluate.train_documents or asked or evaluate.tasks):
            raise UserError(
                f"There is nothing to evaluate {self.subject.name} on: set data.num_held_out, "
                "evaluate.train_documents, evaluate.instructions=FILE or evaluate.tasks."
            )

    def _ask(self) -> list[list[int]]:
        """Find the instructions; the tokens of their prompts."""
        evaluate = self.config.evaluate
        if evaluate.instructions == HELD_OUT:
            if self.corpus is None or not len(self.corpus.held_out):
                return []
            kept = self.corpus.held_out_conversations
            self.instructions = held_out_instructions(kept, evaluate.max_instructions)
        elif evaluate.instructions is not None:
            self.instructions, number = read_instructions(
                evaluate.instructions, evaluate.max_instructions
            )
            if len(self.instructions) < number:
                self.world.log(
                    f"answers: the first {len(self.instructions)} of {number} instructions "
                    "(evaluate.max_instructions)"
                )
            if any(each.conversation.num_left_out for each in self.instructions):
                self.world.log("answers: of several turns, the first is asked")
        if self.instructions:
            text.check_installed()
        prompts = []
        for i, instruction in enumerate(self.instructions):
            try:
                prompts.append(self.subject.template.prompt_ids(instruction.conversation))
            except BadRow as error:
                raise UserError(f"Instruction {i + 1} cannot be asked: {error}.") from error
        return prompts

    def _load(self) -> Any:
        with self.world.agree():
            return self.subject.model

    def _losses(self, corpus: Corpus) -> None:
        evaluate = self.config.evaluate
        num_held_out = min(evaluate.max_documents or len(corpus.held_out), len(corpus.held_out))
        num_train = min(evaluate.train_documents, len(corpus.train))
        settings = {
            "documents": corpus.fingerprint,
            "held_out": num_held_out,
            "train": num_train,
            "model.dtype": self.config.model.dtype,
            "noise": [asdict(self.config.noise), self.config.noise_seed] if num_train else None,
        }
        if self.results.has("losses", settings):
            self.world.log("losses: there from before")
            return
        model, found = self._load(), dict[str, Losses | None]()
        for name, documents, number, noisy in (
            ("held_out", corpus.held_out, num_held_out, False),
            ("train", corpus.train, num_train, False),
            ("train_noisy", corpus.train, num_train, True),
        ):
            told = partial(self._tell, f"losses, {name.replace('_', ' ')}")
            found[name] = (
                document_losses(
                    model, documents, number, self.config, self.world, noisy=noisy, progress=told
                )
                if number
                else None
            )
        items = {name: losses.items() for name, losses in found.items() if losses}
        self.results.put("losses", settings, _loss_figures(found), items)

    def _tell(self, part: str, line: str) -> None:
        self.world.log(f"{part}: {line}")

    def _answers(self) -> None:
        evaluate, folder = self.config.evaluate, self.folder
        settings = {
            "prompts": _digest([self.prompts, [each.reference for each in self.instructions]]),
            "evaluate.max_new_tokens": evaluate.max_new_tokens,
            "evaluate.repetition_penalty": evaluate.repetition_penalty,
            "model.dtype": self.config.model.dtype,
        }
        self.results.begin_answers(settings)
        if self.results.has("answers", settings):
            self.world.log("answers: there from before")
            return
        self._load()
        checked = evaluate.instructions == HELD_OUT and checkable(self.config)
        rows = answer_all(
            self.subject, self.instructions, self.prompts, folder, self.world, checked=checked
        )
        with self.world.agree():
            if self.world.is_first:
                self.results.put_answers(rows)
                values = text.per_answer(rows)
                right = [row["correct"] for row in rows if row["correct"] is not None]
                figures = {
                    "num": len(rows),
                    "exact_match": sum(right) / len(right) if right else None,
                    **text.statistics(rows, values),
                }
                self.results.put("answers", settings, figures, {"answers": values})
                remove_partial(folder)


def lines(summary: dict[str, Any]) -> list[str]:
    """The figures of a summary, to be read by people."""
    told = []
    if losses := summary["losses"]:
        if losses["held_out_loss"] is not None:
            told.append(
                f"held-out loss {losses['held_out_loss']:.4f}, perplexity "
                f"{losses['perplexity']:.2f} ({losses['num_documents']} documents, "
                f"{losses['num_supervised_tokens']} supervised tokens)"
            )
        if losses["train_loss"] is not None:
            told.append(
                f"training loss {losses['train_loss']:.4f}, with noise "
                f"{losses['train_loss_noisy']:.4f} ({losses['num_train_documents']} documents)"
            )
    if answers := dict(summary["answers"] or {}):
        number, right = answers.pop("num"), answers.pop("exact_match")
        told.append(
            f"{number} answers" + (f", exact match {right:.1%}" if right is not None else "")
        )
        figures = ", ".join(f"{name.replace('_', ' ')} {v:.4g}" for name, v in answers.items())
        told += textwrap.wrap(figures, 98, initial_indent="  ", subsequent_indent="  ")
    for name, task in (summary["tasks"] or {}).items():
        told.append(
            f"{name} {task['accuracy']:.1%} +- {task['standard_error']:.1%} "
            f"({task['num_items']} items)"
        )
    return told


def _default_folder(subject: Subject) -> Path:
    if subject.run_dir is None or subject.checkpoint is None:
        raise UserError(f"{subject.name} is no run: say with --output DIR where its results go.")
    return subject.run_dir / "evaluations" / subject.checkpoint.folder.name


def _loss_figures(found: dict[str, Losses | None]) -> dict[str, Any]:
    held_out, train, noisy = (found[name] for name in ("held_out", "train", "train_noisy"))
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
