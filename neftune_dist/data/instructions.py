"""Instructions for the model to answer: held-out conversations, or the rows of a file.

The kind of a file's row is recognised by its fields:

    instruction (or Instruction), input?, output?, dataset?   AlpacaEval and its outputs, WizardLM's
                                                              and Evol's test sets, Alpaca's rows
    turns, category?                                          MT-bench, of which the first turn is
                                                              asked; Vicuna's later form
    text, question_id                                         Vicuna's first form

A row's `output` is the expected answer, unless the row names a `generator`: then it is another
model's. A row that cannot be asked is a `UserError`: an incomplete set could not be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from neftune_dist.config import BUILTIN_SOURCE, HELD_OUT, Config, UserError, read_text, user_path
from neftune_dist.data import fields
from neftune_dist.data.conversation import Conversation, Turn
from neftune_dist.data.dataset import Dataset
from neftune_dist.data.errors import BadRow, type_name
from neftune_dist.data.formats import exchange
from neftune_dist.data.sources import read_row_file
from neftune_dist.data.split import sample
from neftune_dist.data.tokenize import ConversationTokenizer

KEY = "evaluate.instructions"
# `prompt_ids` renders the prompt in front of an answer, so there must be one.
_SOME_ANSWER = Turn("assistant", ".")


@dataclass(frozen=True)
class Instruction:
    """One question.

    Attributes:
        conversation: rendered by the template.
        text: the question as result files have it.
        dataset: the set or group it belongs to.
        reference: the expected answer; None without one.
    """

    conversation: Conversation
    text: str
    dataset: str
    reference: str | None


def held_out_instructions(dataset: Dataset, number: int) -> list[Instruction]:
    """Up to `number` held-out conversations (0: all) with different openings, of all sources, and
    their first answers; plain texts are left out."""
    conversations = dataset.held_out_conversations

    def opening(i: int) -> str | None:
        conversation = conversations[i]
        return json.dumps(conversation.opening()) if conversation.turns else None

    found = []
    for i in sample(dataset.held_out.content, number or len(conversations), opening).tolist():
        conversation = conversations[i]
        asked = [m["content"] for m in conversation.opening() if m["role"] == "user"]
        answer = next(turn.content for turn in conversation.turns if turn.role == "assistant")
        found.append(Instruction(conversation, "\n\n".join(asked), HELD_OUT, answer))
    return found


def read_instructions(name: str, number: int, key: str = KEY) -> tuple[list[Instruction], int]:
    """Read the first `number` instructions of a file (0: all); also return how many it has.

    Args:
        key: the setting that names the file.

    Raises:
        UserError: there is no such file, or one of its rows lacks what must be asked.
    """
    file = Path(name).name.partition(".")[0]
    found = read_row_file(name, key, lambda row: _instruction(row, file))
    return found[: number or None], len(found)


def read_prompts(name: str, key: str) -> list[Instruction]:
    """Read all instructions of a file; of a .txt file every line that is not blank is one.

    Args:
        key: the setting that names the file.

    Raises:
        UserError: as `read_instructions`.
    """
    path = user_path(name, key)
    if path.suffix != ".txt":
        return read_instructions(name, 0, key)[0]
    found = []
    for number, line in enumerate(read_text(name, key).split("\n"), 1):
        try:
            if line := line.strip():
                found.append(_instruction({"instruction": line}, path.stem))
        except BadRow as error:
            raise UserError(f"{key}={name}, line {number}: {error}.") from error
    if not found:
        raise UserError(f"{key}={name} holds no prompt.")
    return found


def prompt_ids(
    instructions: Sequence[Instruction], template: ConversationTokenizer, name: str
) -> list[list[int]]:
    """Tokens of the prompts of instructions.

    Args:
        name: of an instruction, in messages.

    Raises:
        UserError: the template cannot express one of them.
    """
    prompts = []
    for number, instruction in enumerate(instructions, 1):
        try:
            prompts.append(template.prompt_ids(instruction.conversation))
        except BadRow as error:
            raise UserError(f"{name} {number} cannot be asked: {error}.") from error
    return prompts


def checkable(config: Config) -> bool:
    """Whether held-out answers can be marked right or wrong: those of the built-in set."""
    sources = {entry.source for entry in config.data.sources.values()}
    return sources == {BUILTIN_SOURCE} and not config.data.held_out_source


def _instruction(row: Mapping[str, Any], file: str) -> Instruction:
    group, num_later = "category", 0
    if "turns" in row:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns:
            raise BadRow(f"field 'turns' is not a list of questions but {type_name(turns)}")
        num_later = len(turns) - 1
        made = exchange({"turns": turns[0]}, "turns", _SOME_ANSWER)
    elif "question_id" in row and "text" in row:
        made = exchange(row, "text", _SOME_ANSWER)
    else:
        group = "dataset"
        named = next((name for name in ("instruction", "Instruction") if name in row), None)
        if named is None:
            raise BadRow(
                f"field 'instruction' is missing; there are {shorten(', '.join(map(str, row)), 80)}"
            )
        made = exchange(row, named, _SOME_ANSWER)
    expected = row.get("output") if "generator" not in row else None
    return Instruction(
        replace(made, num_left_out=num_later),
        next(str(m["content"]) for m in made.messages() if m["role"] == "user"),
        str(row.get(group) or file),
        fields.text(row, "output") if expected else None,
    )
