"""Law 4: the documents of step s, as a pure function of (data fingerprint, seed, s).

Every epoch is a permutation of all documents, cut into steps of `global_batch_size`. Its last step
takes the rest, so that an epoch has every document exactly once. The length of a run decides where
it ends and nothing else: a run of one epoch that is extended to two trains the same steps as a run
of two epochs. Ranks, world size and packing do not enter; the cursor of a run is its step.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from neftune_dist.config import TrainConfig, UserError
from neftune_dist.data.hashing import GAMMA, splitmix64

DEFAULT_EPOCHS = 3.0  # the paper's (appendix A)


@dataclass(frozen=True)
class Sampler:
    """The documents of every step of a run."""

    fingerprint: str
    seed: int
    num_documents: int
    global_batch_size: int
    num_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps per epoch; the last one may have fewer documents."""
        return math.ceil(self.num_documents / self.global_batch_size)

    @property
    def total_documents(self) -> int:
        """Documents of all steps, repetitions counted."""
        epochs, steps = divmod(self.num_steps, self.steps_per_epoch)
        return epochs * self.num_documents + steps * self.global_batch_size

    def documents(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Document indices and their epochs, int64 (batch,), for 0 <= step < num_steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.fingerprint, self.seed, epoch, self.num_documents)
        first = within * self.global_batch_size
        indices = order[first : first + self.global_batch_size].copy()
        return indices, np.full_like(indices, epoch)


def make_sampler(config: TrainConfig, num_documents: int, fingerprint: str) -> Sampler:
    """The sampler of a run.

    Raises:
        UserError: there are too few documents for a batch.
    """
    batch = config.global_batch_size
    if num_documents < batch:
        raise UserError(
            f"The data holds {num_documents} documents, fewer than "
            f"train.global_batch_size={batch}: lower it."
        )
    return Sampler(fingerprint, config.seed, num_documents, batch, num_steps(config, num_documents))


def num_steps(config: TrainConfig, num_documents: int) -> int:
    """Steps of a run over so many documents; a fraction of an epoch becomes whole steps."""
    if config.max_steps is not None:
        return config.max_steps
    epochs = DEFAULT_EPOCHS if config.num_epochs is None else config.num_epochs
    # Rounded to documents first: 0.29 epochs of 100 documents are 28.999999999999996.
    whole, rest = divmod(max(1, round(epochs * num_documents)), num_documents)
    batch = config.global_batch_size
    return whole * math.ceil(num_documents / batch) + math.ceil(rest / batch)


@lru_cache(maxsize=2)
def _order(fingerprint: str, seed: int, epoch: int, num_documents: int) -> np.ndarray:
    """A permutation of the documents, int64 (num_documents,): sorted by the outputs of SplitMix64
    from a start that the other arguments decide."""
    key = hashlib.sha256(f"{fingerprint}/{seed}/{epoch}".encode()).digest()
    start = np.uint64(int.from_bytes(key[:8], "little"))
    states = np.arange(1, num_documents + 1, dtype=np.uint64) * np.uint64(GAMMA) + start
    return np.argsort(splitmix64(states), kind="stable")
