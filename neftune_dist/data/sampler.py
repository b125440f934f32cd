"""Law 4: which documents form step s, as a pure function of (data fingerprint, seed, s).

Epochs follow each other without end, each a permutation of all documents. An epoch is cut into
steps of `global_batch_size` documents; its last step takes what is left, so that every document is
in an epoch exactly once. The length of the run decides where it ends and nothing else: a run of one
epoch that is extended to two trains what one of two epochs trains. No rank, no world size and no
layout enters, and the cursor of a run is its step.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from neftune_dist.config import TrainConfig, UserError

DEFAULT_EPOCHS = 3.0  # the paper's (appendix A)


@dataclass(frozen=True)
class Sampler:
    """Documents per step."""

    fingerprint: str
    seed: int
    num_documents: int
    global_batch_size: int
    num_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """The last of them may have fewer documents than the others."""
        return math.ceil(self.num_documents / self.global_batch_size)

    @property
    def total_documents(self) -> int:
        """Over all steps, repetitions counted."""
        epochs, steps = divmod(self.num_steps, self.steps_per_epoch)
        rest = min(steps * self.global_batch_size, self.num_documents)
        return epochs * self.num_documents + rest

    def documents(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Document indices and their epochs, int64 (batch,), of step 0 <= step < num_steps."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = _order(self.fingerprint, self.seed, epoch, self.num_documents)
        first = within * self.global_batch_size
        indices = order[first : first + self.global_batch_size].copy()
        return indices, np.full_like(indices, epoch)


def make_sampler(config: TrainConfig, num_documents: int, fingerprint: str) -> Sampler:
    """The sampler of a run; a part of an epoch is rounded up to whole steps.

    Raises:
        UserError: there are too few documents for a batch.
    """
    batch = config.global_batch_size
    if num_documents < batch:
        raise UserError(
            f"The data holds {num_documents} documents, fewer than "
            f"train.global_batch_size={batch}: lower it."
        )
    made = Sampler(fingerprint, config.seed, num_documents, batch, config.max_steps or 0)
    if config.max_steps is not None:
        return made
    epochs = DEFAULT_EPOCHS if config.num_epochs is None else config.num_epochs
    # Rounded to documents first: 0.29 epochs of 100 documents are 28.999999999999996.
    whole, rest = divmod(max(1, round(epochs * num_documents)), num_documents)
    return replace(made, num_steps=whole * made.steps_per_epoch + math.ceil(rest / batch))


@lru_cache(maxsize=2)
def _order(fingerprint: str, seed: int, epoch: int, num_documents: int) -> np.ndarray:
    """A permutation that depends on nothing but its arguments, not on a library's version: the
    documents sorted by SplitMix64 of their index (Steele, Lea, Flood, OOPSLA 2014)."""
    key = hashlib.sha256(f"{fingerprint}/{seed}/{epoch}".encode()).digest()
    start = np.uint64(int.from_bytes(key[:8], "little"))
    z = np.arange(1, num_documents + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
