"""Law 4: the documents of step s, as a pure function of (data fingerprint, seed, s).

Every epoch is a permutation of all documents, cut into steps of `global_batch_size`. Its last step
takes the rest, so that an epoch has every document exactly once. The length of a run decides where
it ends and nothing else: a run of one epoch that is extended to two trains the same steps as a run
of two epochs. Ranks, world size and packing do not enter; the cursor of a run is its step.

The permutation is evaluated at the places of a step alone: time and memory do not depend on the
number of documents.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from neftune_dist.config import TrainConfig, UserError
from neftune_dist.system.text import count_text

# The name of the order, recorded in checkpoints: a run is not resumed in another one. It changes
# where the same data, seed and step give other documents.
ORDER = "feistel-1"
# Luby and Rackoff need 4; small sets, whose halves have few values, need more: of the orders of 5
# documents, some are more frequent than others with 8 rounds, none is with 12.
_ROUNDS = 12
DEFAULT_EPOCHS = 3.0  # the paper's (appendix A)
GAMMA = 0x9E3779B97F4A7C15  # the step from one state of SplitMix64 to the next


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), uint64 to uint64: a hash
    that depends on no library's version, as the order of training must not."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


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
        first = within * self.global_batch_size
        places = np.arange(first, min(first + self.global_batch_size, self.num_documents))
        indices = _order(f"{self.fingerprint}/{self.seed}/{epoch}", self.num_documents, places)
        return indices, np.full_like(indices, epoch)


def make_sampler(config: TrainConfig, num_documents: int, fingerprint: str) -> Sampler:
    """The sampler of a run.

    Raises:
        UserError: there are too few documents for a batch.
    """
    batch = config.global_batch_size
    if num_documents < batch:
        raise UserError(
            f"The data holds {count_text(num_documents, 'document')}, fewer than "
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


def _order(key: str, num_documents: int, places: np.ndarray) -> np.ndarray:
    """The documents, int64, at some places of a permutation of 0 ... num_documents - 1 that `key`
    chooses.

    A Feistel network (Luby, Rackoff, SIAM J. Comput. 17, 1988) on pairs of residues, whose rounds
    add a hash of one half to the other: a permutation of left * right numbers, a few more than the
    documents. A result that is no document is permuted again until it is one (Black, Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002).
    """
    digest = hashlib.sha256(key.encode()).digest()
    start = np.uint64(int.from_bytes(digest[:8], "little"))
    keys = splitmix64(start + np.arange(_ROUNDS, dtype=np.uint64) * np.uint64(GAMMA))
    root = math.isqrt(num_documents - 1) + 1
    left, right = np.uint64(root), np.uint64(-(-num_documents // root))
    found = places.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        a, b = np.divmod(found[outside], right)
        for even, odd in keys.reshape(-1, 2):
            a = (a + splitmix64(even + b * np.uint64(GAMMA)) % left) % left
            b = (b + splitmix64(odd + a * np.uint64(GAMMA)) % right) % right
        found[outside] = a * right + b
        outside = outside[found[outside] >= num_documents]
    return found.astype(np.int64)
