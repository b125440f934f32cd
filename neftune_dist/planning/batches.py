"""The micro-batches that take the most memory: of the run's own data, or as large as allowed."""

from __future__ import annotations

from typing import Any

import numpy as np

from neftune_dist.config import Config
from neftune_dist.data.dataset import Documents
from neftune_dist.data.loader import BatchLayout, MicroBatch, collate, token_multiple
from neftune_dist.data.sampler import Sampler
from neftune_dist.model.flops import model_size

# Longer runs are sampled: steps of this many documents in all, evenly spread.
_MOST_DOCUMENTS = 150_000


def sampled_steps(sampler: Sampler) -> np.ndarray:
    """Return the steps that are searched for the heaviest micro-batches, int64 (num_chosen,)."""
    most = max(16, _MOST_DOCUMENTS // sampler.global_batch_size)
    return np.unique(np.linspace(0, sampler.num_steps - 1, most).astype(np.int64))


def heaviest(
    documents: Documents, sampler: Sampler, config: Config, world_size: int, model: Any
) -> list[MicroBatch]:
    """Return the heaviest micro-batches of a step, over all ranks and sampled steps.

    The first is the heaviest of all that open a step. The second and the third, where steps have
    so many, are the heaviest of the later ones: those run while gradients are kept.

    Args:
        documents: of the training set.
        sampler: gives the documents of each step.
        config: batch size, packing, sequence parallelism.
        world_size: ranks of the run.
        model: on the meta device.
    """
    found: list[tuple[float, np.ndarray, np.ndarray]] = []
    most = 0
    weight, slices = _weight(config, model), config.engine.sequence_parallel
    quadratic_tokens = model_size(model).quadratic_tokens
    layout = BatchLayout(config, 0, world_size // slices, quadratic_tokens, part=(0, slices))
    for step in sampled_steps(sampler).tolist():
        indices, epochs = sampler.documents(step)
        lengths = documents.lengths[indices]
        supervised = documents.num_supervised[indices]
        rounds = layout.assign(lengths)
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
    batches = [_fullest_slice(documents, indices, epochs, config) for _, indices, epochs in found]
    return [*batches, batches[-1]] if most > 2 else batches


def fullest(config: Config) -> list[MicroBatch]:
    """Return three micro-batches full of the longest documents allowed, every token supervised:
    for a plan that does not read the data."""
    tokens = config.train.micro_batch_tokens * config.engine.sequence_parallel
    number = tokens // config.data.max_length
    documents: Any = _Assumed(np.full(number, config.data.max_length))
    epochs = np.zeros(number, np.int64)
    return [_fullest_slice(documents, np.arange(number), epochs, config)] * 3


def _fullest_slice(
    documents: Documents, indices: np.ndarray, epochs: np.ndarray, config: Config
) -> MicroBatch:
    """Return the slice of these documents' micro-batch that has the most supervised tokens."""
    slices = config.engine.sequence_parallel
    multiple = token_multiple(config)
    batch = collate(documents, indices, epochs, config.data.packing, slices, multiple)
    if slices == 1:
        return batch
    return max((batch.slice(i, slices) for i in range(slices)), key=lambda part: len(part.targets))


class _Assumed:
    """Documents of these lengths; a document's first token is never a target."""

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = lengths

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self.lengths[indices]
        supervised = np.ones(lengths.sum(), np.uint8)
        supervised[np.cumsum(lengths) - lengths] = 0
        return np.zeros(lengths.sum(), np.int32), supervised


def _weight(config: Config, model: Any) -> float:
    """Estimate the memory that supervising a token adds, in tokens. It only ranks micro-batches."""
    vocabulary, width = model.get_output_embeddings().weight.shape
    layers = model.config.get_text_config().num_hidden_layers
    logits = 12 * vocabulary / width if config.model.loss == "plain" else 4
    activations = 2 if config.model.activation_checkpointing == "full" else 34
    return float(logits / (layers * activations))
