"""Sample answers while training: fixed prompts, answered greedily by the model as it is, noise off.

The sharded model answers, so that none need fit on one device: at every token the ranks gather the
weights block by block, as for a forward pass of training. All ranks answer all prompts, because
gathering takes the time; those of rank 0 are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from neftune_dist.config import Config
from neftune_dist.data.instructions import Instruction, prompt_ids, read_prompts
from neftune_dist.data.tokenize import ConversationTokenizer
from neftune_dist.distributed.world import World
from neftune_dist.engine.base import Engine
from neftune_dist.model.attention import attention_of
from neftune_dist.model.generation import Generator, batches, end_tokens, generate
from neftune_dist.model.optimizations import without_compiling

_KEY = "evaluate.sample_prompts"


@dataclass(frozen=True)
class Prompts:
    """The prompts of `evaluate.sample_prompts`.

    Attributes:
        asked: in the file's order.
        ids: their tokens, by the run's template.
        batches: indices of those that are answered together.
        tokenizer, end_tokens: of the run.
    """

    asked: list[Instruction]
    ids: list[list[int]]
    batches: list[list[int]]
    tokenizer: Any
    end_tokens: list[int]


def read(config: Config, folder: Path, tokenizer: Any, hf_config: Any) -> Prompts | None:
    """Read and tokenise the prompts; None where the configuration names none.

    Args:
        folder: the base model's files.
        hf_config: its configuration.

    Raises:
        UserError: a file without prompts, or one that the template or the model does not take.
    """
    name = config.evaluate.sample_prompts
    if name is None:
        return None
    asked = read_prompts(name, _KEY)
    template = ConversationTokenizer(tokenizer, config.data)
    shown = f"{_KEY}={name}: prompt"
    ids = prompt_ids(asked, template, shown)
    parts = batches(ids, config.evaluate, hf_config, shown)
    ends = end_tokens(folder, hf_config, template.end_of_turn[0])
    return Prompts(asked, ids, parts, tokenizer, ends)


class SampleAnswers:
    """The answers of a run's model to its prompts. They move no generator of random numbers."""

    def __init__(self, prompts: Prompts, config: Config, world: World) -> None:
        self.prompts, self.config, self.world = prompts, config, world

    def answer(
        self, engine: Engine, step: int, stop_requested: Callable[[], bool]
    ) -> list[dict[str, Any]] | None:
        """Return the rows of samples.jsonl: a collective of all ranks, by an engine in evaluation
        mode. None where any rank was asked to stop before the last batch."""
        asked, ids, model = self.prompts.asked, self.prompts.ids, engine.model
        model.generation_config = transformers.GenerationConfig()  # its own sampling settings
        generator = Generator(
            model,
            self.prompts.tokenizer,
            self.prompts.end_tokens,
            self.config.evaluate,
            self.world.device,
            synced=self.world.size > 1,
        )
        found: dict[int, dict[str, Any]] = {}
        # Packed attention has no cache of keys and values.
        attention = "eager" if self.config.model.attention == "eager" else "sdpa"
        with attention_of(model, attention), without_compiling():
            for batch in self.prompts.batches:
                if self.world.any(stop_requested()):
                    return None
                answers = generate(generator, [ids[i] for i in batch])
                for i, answer in zip(batch, answers, strict=True):
                    text = asked[i].text
                    found[i] = {"step": step, "index": i, "instruction": text, **vars(answer)}
        return [found[i] for i in sorted(found)]
