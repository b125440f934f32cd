"""The heaviest micro-batches: those of the run's own layout, or all that the settings allow."""

from __future__ import annotations

from typing import Any

import numpy as np

from neftune_dist.config import Config
from neftune_dist.data.dataset import Documents
from neftune_dist.data.loader import MicroBatch, collate, token_multiple
from neftune_dist.data.packing import assign_documents
from neftune_dist.data.sampler import Sampler
from neftune_dist.model.flops import model_size

# Of longer runs, steps of so many documents in all are looked at, evenly spread.
_MOST_DOCUMENTS = 150_000


def looked_at(sampler: Sampler) -> np.ndarray:
    """The steps among which the heaviest micro-batches are looked for, int64 (num_chosen,)."""
    most = max(16, _MOST_DOCUMENTS // sampler.global_batch_size)
    return np.unique(np.linspace(0, sampler.num_steps - 1, most).astype(np.int64))


def heaviest(
    documents: Documents, sampler: Sampler, config: Config, world_size: int, model: Any
) -> list[MicroBatch]:
    """Of all ranks' first micro-batches in a step the heaviest; then, as a second and a third where
    steps have them, that of all later ones, which meet the gradients of those before."""
    found: list[tuple[float, np.ndarray, np.ndarray]] = []
    most = 0
    weight, quadratic_tokens = _weight(config, model), model_size(model).quadratic_tokens
    slices = config.engine.sequence_parallel
    for step in looked_at(sampler).tolist():
        indices, epochs = sampler.documents(step)
        lengths = documents.lengths[indices]
        supervised = documents.num_supervised[indices]
        rounds = assign_documents(
            lengths,
            world_size // slices,
            config.train.micro_batch_tokens * slices,
            config.data.packing,
            quadratic_tokens,
        )
        most = max(most, len(rounds))
        for place, groups in enumerate(rounds):
            for group in map(list, filter(None, groups)):
                tokens = lengths[group]
                num_tokens = tokens.sum() if config.data.packing else len(group) * tokens.max()
                cost = num_tokens + weight * supervised[group].sum()
                which = min(place, 1)
                if which == len(found):
                    found.append((0.0, indices[:0], epochs[:0]))
                if cost > found[which][0]:
                    found[which] = (cost, indices[group], epochs[group])
    batches = [_fullest_slice(documents, *each[1:], config) for each in found]
    return [*batches, batches[-1]] if most > 2 else batches


def fullest(config: Config) -> list[MicroBatch]:
    """Where the data is not to be read: three micro-batches full of the longest documents, all of
    whose tokens are learned."""
    tokens = config.train.micro_batch_tokens * config.engine.sequence_parallel
    number = tokens // config.data.max_length
    documents: Any = _Assumed(np.full(number, config.data.max_length))
    epochs = np.zeros(number, np.int64)
    return [_fullest_slice(documents, np.arange(number), epochs, config)] * 3


def _fullest_slice(
    documents: Documents, indices: np.ndarray, epochs: np.ndarray, config: Config
) -> MicroBatch:
    """Of the micro-batch of these documents, the rank's with the most to learn."""
    slices = config.engine.sequence_parallel
    multiple = token_multiple(config)
    batch = collate(documents, indices, epochs, config.data.packing, slices, multiple)
    if slices == 1:
        return batch
    return max((batch.slice(i, slices) for i in range(slices)), key=lambda each: len(each.targets))


class _Assumed:
    """Documents of these lengths; a document's first token is never learned."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.lengths[indices]
        supervised = np.ones(lengths.sum(), np.uint8)
        supervised[np.cumsum(lengths) - lengths] = 0
        return np.zeros(lengths.sum(), np.int32), supervised


def _weight(config: Config, model: Any) -> float:
    """Roughly what a supervised token adds to memory, as a number of tokens. It only ranks
    micro-batches, which differ little."""
    vocabulary, width = model.get_output_embeddings().weight.shape
    layers = model.config.get_text_config().num_hidden_layers
    logits = 12 * vocabulary / width if config.model.loss == "plain" else 4
    activations = 2 if config.model.activation_checkpointing == "full" else 34
    return float(logits / (layers * activations))
