"""Answers to instructions, in batches padded on the left; a stopped call is continued.

Batches depend on the prompts and `evaluate.batch_size` alone, and ranks share whole batches: the
number of ranks changes no answer. Each rank appends a finished batch to its own file; a batch that
was incomplete when a process died is answered again. An answer equals that to its prompt alone, up
to rounding.

Where answers are sampled, their draws are a pure function of the prompt and the number of the
sample (`Draws`): no batch, rank or other prompt changes them, and two models are compared with the
same draws. Torch's generators are neither read nor moved.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from neftune_dist.data import builtin
from neftune_dist.data.instructions import Instruction
from neftune_dist.distributed.world import World
from neftune_dist.evaluation.journal import Journal, read_rows
from neftune_dist.evaluation.target import EvaluationTarget
from neftune_dist.model.families import answers_in_batches
from neftune_dist.model.generation import Generated, batches, generate
from neftune_dist.noise.philox import philox4x32

_PARTIAL = re.compile(r"answers\d*\.jsonl")  # of all ranks that ever worked on it


class Draws(transformers.LogitsProcessor):  # type: ignore[misc]
    """Noise on the scores, with which the greatest is a draw from softmax(scores / temperature).

    The noise is temperature times Gumbel's, -ln(-ln(1 - u)) (the Gumbel-max trick; Maddison et al.,
    arXiv 1411.0030, section 2), with u in (0, 1) from Philox4x32-10 at the counter (block of four
    tokens of the vocabulary, position in the answer, 64 bits of the digest of prompt and sample).
    """

    def __init__(
        self, prompts: Sequence[list[int]], samples: Sequence[int], temperature: float
    ) -> None:
        keys = [repr((prompt, s)).encode() for prompt, s in zip(prompts, samples, strict=True)]
        digests = [hashlib.sha256(key).digest() for key in keys]
        halves = [[int.from_bytes(d[:4], "big"), int.from_bytes(d[4:8], "big")] for d in digests]
        self._streams = torch.tensor(halves)  # (num_prompts, 2), 32-bit words
        self._width, self._temperature = max(map(len, prompts)), temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        vocabulary, device = scores.shape[1], scores.device
        blocks = torch.arange(-(-vocabulary // 4), device=device)[None]
        position = torch.full_like(blocks, input_ids.shape[1] - self._width)
        one, two = self._streams.to(device)[:, :, None].unbind(1)
        words = philox4x32((blocks, position, one, two), key=(0, 0))
        units = (torch.stack(words, dim=-1).flatten(1)[:, :vocabulary] + 0.5) * 2.0**-32
        # The greatest noise comes from small u, which float32 holds finely; none may round to 1.
        units = units.clamp_(max=1 - 2.0**-24)
        return scores - self._temperature * torch.log(-torch.log1p(-units))


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
        instructions: what `answers.json` will hold, in order, `evaluate.samples` rows of each.
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
        hf_config = target.model.config
        if not answers_in_batches(hf_config):
            world.log(f"answers: one by one, as padding would change them ({hf_config.model_type})")
        num, samples = len(prompts), config.samples
        prompts = [*prompts] * samples  # number `sample * num + i`
        of_prompts = batches(prompts, config, hf_config, "Instruction")
        done = _read_partial(folder)
    # All ranks must have read what is there before any of them appends.
    with world.agree():
        left = [batch for batch in of_prompts if not all(i in done for i in batch)]
        mine = left[world.rank :: world.size]
        journal = Journal(folder / f"answers{world.rank or ''}.jsonl")
    if done and left:
        world.log(f"answers: {len(done)} of {len(prompts)} kept from an earlier call")
    with world.agree():
        answered, share = 0, sum(map(len, mine))
        of_all = f", this rank's share of {len(prompts)}" if share < len(prompts) else ""
        for batch in mine:
            rows = [prompts[i] for i in batch]
            draws = [Draws(rows, [i // num for i in batch], config.temperature)]
            generated = generate(target.generator, rows, draws if config.temperature else ())
            journal.append([{"index": i, **vars(g)} for i, g in zip(batch, generated, strict=True)])
            answered += len(batch)
            world.log(f"answers: {answered} of {share}{of_all}")
    if not world.is_first:
        return []
    done = _read_partial(folder)
    return [
        _row(target, instruction, done[sample * num + i], checked)
        | ({"sample": sample} if samples > 1 else {})
        for i, instruction in enumerate(instructions)
        for sample in range(samples)
    ]


def remove_partial(folder: Path) -> None:
    """Remove the files from which `answer_all` continues. Rank 0, after answers.json is written."""
    for path in _partial(folder):
        with suppress(OSError):  # answers.json has it all
            path.unlink()


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
