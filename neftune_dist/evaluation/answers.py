"""Answers to instructions: greedy, batched, padded on the left, continued where they were stopped.

A batch is a pure function of the prompts and `evaluate.batch_size`, and whole batches are dealt to
ranks: their number does not change what is answered. Each rank appends the answers of a batch to a
file of its own as soon as they are there; what was half written when a process died is dropped, and
its batch answered again. The answer of a row is what its prompt would get alone, up to rounding.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from neftune_dist.config import EvaluateConfig, UserError, match_schema, parse_json, with_checksum
from neftune_dist.data import builtin
from neftune_dist.distributed.world import World
from neftune_dist.evaluation.instructions import Instruction
from neftune_dist.evaluation.target import Subject
from neftune_dist.model.families import longest_document

_PARTIAL = re.compile(r"answers\d*\.jsonl")  # of all ranks that ever worked on it


@dataclass(frozen=True)
class Generated:
    """output: text without special tokens and white space around. num_tokens: generated, without
    the one that ends. finished: False where the limit cut it."""

    output: str
    num_tokens: int
    finished: bool


def answer_all(
    subject: Subject,
    instructions: Sequence[Instruction],
    prompts: Sequence[list[int]],
    folder: Path,
    world: World,
    *,
    checked: bool = False,
) -> list[dict[str, Any]]:
    """The rows of answers.json, in the order of the instructions; on rank 0, none on others. A
    collective of all ranks, who see the same folder.

    Args:
        prompts: of the instructions, tokens.
        checked: whether an answer is right or wrong by its reference.

    Raises:
        UserError: a prompt longer than what the model takes, or a folder that cannot be written.
    """
    config = subject.config.evaluate
    with world.agree():
        limit = longest_document(subject.model.config)
        batches = _batches(prompts, config, limit)
        done = _read_partial(folder)
    # Before any rank writes anew, all must have read what was there.
    with world.agree():
        left = [batch for batch in batches if not all(i in done for i in batch)]
        mine = left[world.rank :: world.size]
        file = _Appended(folder / f"answers{world.rank or ''}.jsonl")
    if done and left:
        world.log(f"answers: {len(done)} of {len(prompts)} are there from before")
    with world.agree():
        answered, share = 0, sum(map(len, mine))
        of_all = f", this rank's share of {len(prompts)}" if share < len(prompts) else ""
        for batch in mine:
            rows = [prompts[i] for i in batch]
            generated = generate(subject, rows, config, limit)
            file.append([{"index": i, **vars(g)} for i, g in zip(batch, generated, strict=True)])
            answered += len(batch)
            world.log(f"answers: {answered} of {share}{of_all}")
        file.close()
    if not world.is_first:
        return []
    done = _read_partial(folder)
    return [
        _row(subject, instruction, done[i], checked) for i, instruction in enumerate(instructions)
    ]


def remove_partial(folder: Path) -> None:
    """Take away what `answer_all` kept for a second call. Rank 0, when all is written elsewhere."""
    for path in _partial(folder):
        with suppress(OSError):  # it holds nothing that is not elsewhere
            path.unlink()


@torch.no_grad()
def generate(
    subject: Subject, prompts: Sequence[list[int]], config: EvaluateConfig, limit: int | None
) -> list[Generated]:
    """Answers to prompts as one batch.

    Args:
        limit: most tokens of a prompt and its answer that the model takes; None: any.
    """
    width = max(map(len, prompts))
    # Masked, padding decides nothing; but a transformers that does not exempt it punishes it as a
    # repetition. So a row is padded with a token of its own, which is one anyway.
    ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    ends = subject.end_tokens
    settings = transformers.GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=_room(width, config, limit),
        repetition_penalty=float(config.repetition_penalty),
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    out: Tensor = subject.model.generate(
        ids.to(subject.device),
        attention_mask=mask.to(subject.device),
        generation_config=settings,
    )
    return [_generated(row, subject) for row in out[:, width:].tolist()]


def _generated(tokens: list[int], subject: Subject) -> Generated:
    ends = set(subject.end_tokens)
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    said = subject.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return Generated(said, length, finished=length < len(tokens))


def _room(length: int, config: EvaluateConfig, limit: int | None) -> int:
    """Tokens that the answer to a prompt of this length may have."""
    most = config.max_new_tokens
    return most if limit is None else min(most, limit - length)


def _batches(
    prompts: Sequence[list[int]], config: EvaluateConfig, limit: int | None
) -> list[list[int]]:
    """Indices of prompts of like length, the longest first: what does not fit into memory shows at
    once. A prompt that leaves the model no room for a full answer is answered by itself, so that
    it shortens no other's."""
    for i, prompt in enumerate(prompts):
        if limit is not None and len(prompt) >= limit:
            raise UserError(
                f"Instruction {i + 1} has {len(prompt)} tokens, and the model takes {limit} with "
                "its answer: leave it out."
            )
    lengths = [len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    cut = [i for i in order if _room(lengths[i], config, limit) < config.max_new_tokens]
    full, size = order[len(cut) :], config.batch_size
    return [[i] for i in cut] + [full[i : i + size] for i in range(0, len(full), size)]


def _row(
    subject: Subject, instruction: Instruction, done: dict[str, Any], checked: bool
) -> dict[str, Any]:
    expected, said = instruction.reference, done["output"]
    correct = builtin.exact_match(said, expected) if checked and expected is not None else None
    return {
        "instruction": instruction.text,
        "output": said,
        "generator": subject.name,
        "dataset": instruction.dataset,
        "reference": expected,
        "num_tokens": done["num_tokens"],
        "finished": done["finished"],
        "correct": correct,
    }


def _partial(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if _PARTIAL.fullmatch(each.name))


def _read_partial(folder: Path) -> dict[int, dict[str, Any]]:
    """What was answered before, by the instruction's index; less a line that was cut short."""
    done: dict[int, dict[str, Any]] = {}
    for path in _partial(folder):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                try:
                    row = parse_json(line, {"index": int})
                    index = row.pop("index")
                    done[index] = vars(match_schema(row, Generated))
                except ValueError:
                    continue  # damaged: it is answered again
    return done


class _Appended:
    """A file of lines, to which whole batches are added."""

    def __init__(self, path: Path) -> None:
        self._what = f"{path} cannot be written"
        try:
            self._file = path.open("ab+")
            self._file.seek(0)
            content = self._file.read()
            self._file.truncate(content.rfind(b"\n") + 1)  # a line that was cut short
        except OSError as error:
            raise UserError(f"{self._what}: {error.strerror or error}.") from error

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Put rows on the disk."""
        try:
            self._file.write(
                "".join(json.dumps(with_checksum(row)) + "\n" for row in rows).encode()
            )
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._what}: {error.strerror or error}.") from error

    def close(self) -> None:
        """Nothing is added any more."""
        self._file.close()
