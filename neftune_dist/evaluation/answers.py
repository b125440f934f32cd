"""Greedy answers to instructions, in batches padded on the left; a stopped call is continued.

Batches depend on the prompts and `evaluate.batch_size` alone, and ranks share whole batches: the
number of ranks changes no answer. Each rank appends a finished batch to its own file; a batch that
was incomplete when a process died is answered again. An answer equals that to its prompt alone, up
to rounding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neftune_dist.config import EvaluateConfig, UserError
from neftune_dist.data import builtin
from neftune_dist.distributed.world import World
from neftune_dist.evaluation.instructions import Instruction
from neftune_dist.evaluation.journal import Journal, read_rows
from neftune_dist.evaluation.target import EvaluationTarget
from neftune_dist.model.families import longest_document

_PARTIAL = re.compile(r"answers\d*\.jsonl")  # of all ranks that ever worked on it


@dataclass(frozen=True)
class Generated:
    """One answer.

    Attributes:
        output: text, stripped, without special tokens.
        num_tokens: generated, without the end token.
        finished: False where the limit cut it.
    """

    output: str
    num_tokens: int
    finished: bool


def answer_all(
    target: EvaluationTarget,
    instructions: Sequence[Instruction],
    prompts: Sequence[list[int]],
    folder: Path,
    world: World,
    *,
    checked: bool = False,
) -> list[dict[str, Any]]:
    """Answer all instructions: a collective of all ranks, which see the same folder.

    Args:
        target: the model.
        instructions: what `answers.json` will hold, in order.
        prompts: tokens of the instructions.
        folder: for the answers so far, from which a second call continues.
        world: the ranks.
        checked: whether to mark answers right or wrong by their references.

    Returns:
        The rows of answers.json on rank 0, none on other ranks.

    Raises:
        UserError: a prompt longer than what the model takes, or a folder that cannot be written.
    """
    config = target.config.evaluate
    with world.agree():
        limit = longest_document(target.model.config)
        batches = _batches(prompts, config, limit)
        done = _read_partial(folder)
    # All ranks must have read what is there before any of them appends.
    with world.agree():
        left = [batch for batch in batches if not all(i in done for i in batch)]
        mine = left[world.rank :: world.size]
        journal = Journal(folder / f"answers{world.rank or ''}.jsonl")
    if done and left:
        world.log(f"answers: {len(done)} of {len(prompts)} kept from an earlier call")
    with world.agree():
        answered, share = 0, sum(map(len, mine))
        of_all = f", this rank's share of {len(prompts)}" if share < len(prompts) else ""
        for batch in mine:
            rows = [prompts[i] for i in batch]
            generated = generate(target, rows, limit)
            journal.append([{"index": i, **vars(g)} for i, g in zip(batch, generated, strict=True)])
            answered += len(batch)
            world.log(f"answers: {answered} of {share}{of_all}")
    if not world.is_first:
        return []
    done = _read_partial(folder)
    return [
        _row(target, instruction, done[i], checked) for i, instruction in enumerate(instructions)
    ]


def remove_partial(folder: Path) -> None:
    """Remove the files from which `answer_all` continues. Rank 0, after answers.json is written."""
    for path in _partial(folder):
        with suppress(OSError):  # answers.json has it all
            path.unlink()


@torch.no_grad()
def generate(
    target: EvaluationTarget, prompts: Sequence[list[int]], limit: int | None
) -> list[Generated]:
    """Answer prompts as one batch.

    Args:
        target: the model.
        prompts: their tokens.
        limit: most tokens of a prompt and its answer that the model takes; None: any.
    """
    width = max(map(len, prompts))
    # The repetition penalty sees masked padding, too (transformers 5). So a row is padded with its
    # first token, which counts as seen anyway.
    ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    out: Tensor = target.model.generate(
        ids.to(target.device),
        attention_mask=mask.to(target.device),
        **target.generation_settings(_room(width, target.config.evaluate, limit)),
    )
    return [_generated(row, target) for row in out[:, width:].tolist()]


def _generated(tokens: list[int], target: EvaluationTarget) -> Generated:
    ends = set(target.end_tokens)
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    said = target.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return Generated(said, length, finished=length < len(tokens))


def _room(length: int, config: EvaluateConfig, limit: int | None) -> int:
    """Tokens that the answer to a prompt of this length may have."""
    most = config.max_new_tokens
    return most if limit is None else min(most, limit - length)


def _batches(
    prompts: Sequence[list[int]], config: EvaluateConfig, limit: int | None
) -> list[list[int]]:
    """Indices of prompts of similar length, longest first, so that too large a batch fails at once.

    A prompt without room for a full answer forms its own batch: it shortens no other answer."""
    for i, prompt in enumerate(prompts):
        if limit is not None and len(prompt) >= limit:
            raise UserError(
                f"Instruction {i + 1} has {len(prompt)} tokens, and the model takes {limit} "
                "with the answer: remove it."
            )
    lengths = [len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    cut = [i for i in order if _room(lengths[i], config, limit) < config.max_new_tokens]
    full, size = order[len(cut) :], config.batch_size
    return [[i] for i in cut] + [full[i : i + size] for i in range(0, len(full), size)]


def _row(
    target: EvaluationTarget, instruction: Instruction, done: Generated, checked: bool
) -> dict[str, Any]:
    expected, said = instruction.reference, done.output
    correct = builtin.exact_match(said, expected) if checked and expected is not None else None
    return {
        "instruction": instruction.text,
        "output": said,
        "generator": target.name,
        "dataset": instruction.dataset,
        "reference": expected,
        "num_tokens": done.num_tokens,
        "finished": done.finished,
        "correct": correct,
    }


def _partial(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if _PARTIAL.fullmatch(path.name))


def _read_partial(folder: Path) -> dict[int, Generated]:
    """Answers by the instruction's index; damaged lines are left out and answered again."""
    form = {"index": int, "output": str, "num_tokens": int, "finished": bool}
    rows = [row for path in _partial(folder) for row in read_rows(path, form)]
    return {row.pop("index"): Generated(**row) for row in rows}
