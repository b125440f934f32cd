"""Law 4: which documents form step s, as a pure function of (data fingerprint, seed, s).

The documents of all epochs form one endless sequence, each epoch in an order of its own; step s
takes the next `global_batch_size` of them. The last step of a run given in epochs takes what is
left, so that every document is trained on exactly as often as was asked. No rank, no world size and
no layout enters, and the cursor of a run is its step.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from neftune_dist.config import TrainConfig, UserError

DEFAULT_EPOCHS = 3.0  # the paper's (appendix A)


@dataclass(frozen=True)
class Schedule:
    """Documents per step."""

    fingerprint: str
    seed: int
    num_documents: int
    global_batch_size: int
    num_steps: int
    total_documents: int  # over all steps, repetitions counted

    def documents(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Document indices and their epochs, int64 (batch,), of step 0 <= step < num_steps."""
        first = step * self.global_batch_size
        last = min(first + self.global_batch_size, self.total_documents)
        place = np.arange(first, last)
        epochs, within = np.divmod(place, self.num_documents)
        indices = np.empty_like(place)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = _order(self.fingerprint, self.seed, int(epoch), self.num_documents)[
                within[chosen]
            ]
        return indices, epochs


def make_schedule(config: TrainConfig, num_documents: int, fingerprint: str) -> Schedule:
    """The schedule of a run. Raises `UserError` where there are too few documents for a batch."""
    batch = config.global_batch_size
    if num_documents < batch:
        raise UserError(
            f"The data holds {num_documents} documents, fewer than "
            f"train.global_batch_size={batch}: lower it."
        )
    if config.max_steps is not None:
        total = config.max_steps * batch
    else:
        epochs = DEFAULT_EPOCHS if config.num_epochs is None else config.num_epochs
        total = max(1, round(epochs * num_documents))
    return Schedule(fingerprint, config.seed, num_documents, batch, math.ceil(total / batch), total)


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
