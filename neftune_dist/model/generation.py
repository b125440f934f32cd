"""Answers by transformers' `generate`, in batches padded on the left.

A prompt's answer is the same in a batch as alone, up to rounding: models that padding disturbs
answer one by one. Decoding is greedy, unless a caller asks for samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from neftune_dist.config import EvaluateConfig, UserError
from neftune_dist.model.families import answers_in_batches, first_position, longest_document
from neftune_dist.system.model_files import generation_settings


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


@dataclass(frozen=True)
class Generator:
    """A model that answers, and how.

    Attributes:
        model: the Hugging Face causal LM, whole or sharded, in evaluation mode.
        tokenizer: its own.
        end_tokens: at which an answer ends.
        config: the section `evaluate`.
        device: where the model computes.
        synced: whether the ranks of a sharded model answer together, until the last has ended.
    """

    model: Any
    tokenizer: Any
    end_tokens: list[int]
    config: EvaluateConfig
    device: torch.device
    synced: bool = False

    @torch.no_grad()
    def run(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        processors: Sequence[transformers.LogitsProcessor] = (),
        streamer: Any = None,
        sampling: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Answer prompts by transformers' `generate`, with the evaluation's repetition penalty and
        end tokens; return the new tokens, (num_prompts, num_new).

        Args:
            prompts: their tokens, padded on the left here.
            max_new_tokens: of an answer.
            processors: change the scores of the next token after the repetition penalty.
            streamer: gets the tokens as they come.
            sampling: as `GenerationConfig` takes it; None: decoding is greedy.
        """
        config = transformers.GenerationConfig(
            **(sampling or {"do_sample": False, "num_beams": 1}),
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_tokens or None,
            pad_token_id=self.end_tokens[0] if self.end_tokens else 0,
        )
        penalty = _Penalty(float(self.config.repetition_penalty), self.end_tokens)
        width = max(map(len, prompts))
        # The repetition penalty sees masked padding, too (transformers 5). So a row is padded with
        # its first token, which counts as seen anyway.
        ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
        positions: dict[str, Tensor] = {}
        if first := first_position(self.model.config):  # transformers would begin at 0
            positions["position_ids"] = (mask.cumsum(-1) - 1 + first).to(self.device)
        out: Tensor = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([penalty, *processors]),
            synced_gpus=self.synced,
            streamer=streamer,
            **positions,
        )
        return out[:, width:]


def end_tokens(folder: Path, hf_config: Any, of_template: Sequence[int]) -> list[int]:
    """Tokens that end an answer: those of the model's files, and the one that ends an answer in the
    template (a base model's files do not name it).

    Args:
        folder: the model's files.
        hf_config: its configuration.
        of_template: as `ConversationTokenizer.end_of_turn` gives them.
    """
    own = generation_settings(folder, hf_config.eos_token_id)["eos_token_id"]
    return sorted({*own, *of_template})


def generate(
    generator: Generator,
    prompts: Sequence[list[int]],
    processors: Sequence[transformers.LogitsProcessor] = (),
) -> list[Generated]:
    """Answer prompts as one batch, of `batches`; of the scores after `processors` the greatest is
    taken."""
    limit = longest_document(generator.model.config)
    room = _room(max(map(len, prompts)), generator.config, limit)
    return [_generated(row, generator) for row in generator.run(prompts, room, processors).tolist()]


def batches(
    prompts: Sequence[list[int]], config: EvaluateConfig, hf_config: Any, name: str
) -> list[list[int]]:
    """Indices of prompts of similar length, longest first, so that too large a batch fails at once.

    A prompt without room for a full answer forms its own batch: it shortens no other answer.

    Args:
        prompts: their tokens.
        config: the section `evaluate`.
        hf_config: of the model.
        name: of a prompt, in messages.

    Raises:
        UserError: the model takes no answer after one of them.
    """
    limit = longest_document(hf_config)
    for i, prompt in enumerate(prompts):
        if limit is not None and len(prompt) >= limit:
            raise UserError(
                f"{name} {i + 1} has {len(prompt)} tokens, and the model takes {limit} "
                "with the answer: remove it."
            )
    lengths = [len(prompt) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-lengths[i], i))
    cut = [i for i in order if _room(lengths[i], config, limit) < config.max_new_tokens]
    full, size = order[len(cut) :], config.batch_size if answers_in_batches(hf_config) else 1
    return [[i] for i in cut] + [full[i : i + size] for i in range(0, len(full), size)]


def _generated(tokens: list[int], generator: Generator) -> Generated:
    ends = set(generator.end_tokens)
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    said = generator.tokenizer.decode(tokens[:length], skip_special_tokens=True).strip()
    return Generated(said, length, finished=length < len(tokens))


def _room(length: int, config: EvaluateConfig, limit: int | None) -> int:
    """Tokens that the answer to a prompt of this length may have."""
    most = config.max_new_tokens
    return most if limit is None else min(most, limit - length)


class _Penalty(transformers.RepetitionPenaltyLogitsProcessor):  # type: ignore[misc]
    """The repetition penalty, without the tokens that end an answer: a chat template's prompt holds
    one for every turn, and a penalty on it keeps answers from ending."""

    def __init__(self, penalty: float, exempt: list[int]) -> None:
        super().__init__(penalty)
        self._exempt = exempt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        penalised: Tensor = super().__call__(input_ids, scores)
        penalised[:, self._exempt] = scores[:, self._exempt]
        return penalised
