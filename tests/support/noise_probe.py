"""What transformers' trainers put into a model: the noise of every forward pass, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


@dataclass(frozen=True)
class Forward:
    """One forward pass: what the first layer received, less the embedding's plain lookup."""

    step: int
    training: bool
    document: Tensor  # int64 (rows, columns): which of the batch's documents; -1 is padding
    noise: Tensor  # float32 (rows, columns, hidden_size)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each document."""
        return self.document[self.document >= 0].bincount()

    @property
    def draws(self) -> Tensor:
        """Noise on the documents' tokens, (num_tokens, hidden_size)."""
        return self.noise[self.document >= 0]

    @property
    def padding(self) -> Tensor:
        """Noise on the padding, (num_padding_tokens, hidden_size)."""
        return self.noise[self.document < 0]

    @property
    def keys(self) -> Tensor:
        """Of each noised token the signs of its first 63 channels, int64 (num_noised_tokens,): they
        name its draws whatever these were scaled with. Two alike by chance: one pair in 10^19."""
        noised = self.noise[self.noise.any(-1)]
        return ((noised[:, :63] > 0) * 2 ** torch.arange(63)).sum(-1)

    def norms(self) -> Tensor:
        """L2 norm of each document's noise, float64."""
        squares = self.draws.double().square().sum(-1)
        documents = self.document[self.document >= 0]
        return torch.zeros(len(self.lengths)).double().index_add(0, documents, squares).sqrt()


class Recorder(TrainerCallback):
    """Measures, while training goes on, every forward pass of a Llama, bare or under PEFT."""

    def __init__(self) -> None:
        self.forwards: list[Forward] = []
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.remove()  # where an exception ended the training before
        model = kwargs["model"]
        layer = next(part for part in model.modules() if isinstance(part, LlamaDecoderLayer))
        batch: dict[str, Tensor] = {}

        def before_model(_: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            batch.update(arguments)

        def before_layer(_: nn.Module, args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
            if not batch:
                return  # activation checkpointing computes the layer again
            x = (args[0] if args else arguments["hidden_states"]).detach()
            lookup = nn.functional.embedding(
                batch["input_ids"], model.get_input_embeddings().weight.detach()
            )
            document = _documents(batch)
            self.forwards.append(Forward(state.global_step, model.training, document, x - lookup))
            batch.clear()

        self._hooks = [
            model.register_forward_pre_hook(before_model, with_kwargs=True),
            layer.register_forward_pre_hook(before_layer, with_kwargs=True),
        ]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.remove()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _documents(batch: dict[str, Tensor]) -> Tensor:
    """By a padded batch's mask, or where a packed batch's positions start at 0."""
    mask = batch.get("attention_mask")
    if mask is None:
        return ((batch["position_ids"] == 0).flatten().cumsum(0) - 1).view_as(batch["input_ids"])
    rows = torch.arange(len(mask))[:, None].expand_as(mask)
    return torch.where(mask.bool(), rows, -1)
