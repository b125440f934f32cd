"""The split of documents into training and held-out ones, and samples of either.

A pure function of the documents' digests and the settings, without a random generator; the order of
rows decides only the order of documents. Every choice takes the smallest digests, so that a larger
choice includes a smaller one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from neftune_dist.config import DataConfig, SourceConfig, UserError
from neftune_dist.data.documents import Documents
from neftune_dist.data.sampler import GAMMA, splitmix64
from neftune_dist.system.text import count_text

# Keys that make the choices by cap, by fractional weight and of a sample independent.
_CAP, _FRACTION, _SAMPLE = 1, 2, 3


@dataclass(frozen=True)
class Split:
    """Indices of documents, int64.

    Attributes:
        train: a document stands here as often as an epoch has it.
        held_out: documents kept for evaluation.
        repeated: training documents equal to an earlier document.
        leaked: left out because the held-out source has their prompt.
        not_chosen: left out by `max_documents` or a weight below 1.
    """

    train: np.ndarray
    held_out: np.ndarray
    repeated: np.ndarray
    leaked: np.ndarray
    not_chosen: np.ndarray


def split_documents(
    stats: np.ndarray, config: DataConfig, sources: Sequence[SourceConfig]
) -> Split:
    """Split all documents.

    Args:
        stats: `documents.STATS` of all documents.
        config: the duplicates' and the held-out settings.
        sources: settings of the training sources; documents of a further source are held out.

    Raises:
        UserError: nothing is left to train on.
    """
    is_reserved = stats["source"] >= len(sources)  # of the held-out source
    _, first = np.unique(stats["content"], return_index=True)
    repeated = ~is_reserved
    repeated[first] = False
    training = ~is_reserved
    if config.duplicates == "drop":
        training &= ~repeated
    num_candidates = int(training.sum())
    held_out, leaked = is_reserved, np.zeros_like(is_reserved)
    if config.held_out_source:
        leaked = training & np.isin(stats["prompt"], stats["prompt"][is_reserved])
    elif config.holds_out:
        held_out = _hold_out(stats["prompt"], training, config)
    training &= ~held_out & ~leaked
    if not training.any():
        ways = ("num_held_out", "held_out_fraction", "held_out_source")
        way = next(name for name in ways if getattr(config, name))
        raise UserError(
            f"data.{way}={getattr(config, way)} leaves none of "
            f"{count_text(num_candidates, 'document')} to train on."
        )
    times = np.zeros(len(stats), np.int64)
    for i, source in enumerate(sources):
        chosen = np.flatnonzero(training & (stats["source"] == i))
        if 0 < source.max_documents < len(chosen):
            order = np.argsort(_keyed(stats["content"][chosen], _CAP), kind="stable")
            chosen = chosen[order[: source.max_documents]]
        whole, fraction = divmod(source.weight, 1)
        more = _keyed(stats["content"][chosen], _FRACTION) < np.uint64(fraction * 2**64)
        times[chosen] = int(whole) + more
        if len(chosen) and not times[chosen].any():
            raise UserError(
                f"data.mixture[{i}].weight={source.weight} leaves none of "
                f"{count_text(len(chosen), 'document')} to train on: raise it."
            )
    return Split(
        train=np.repeat(np.arange(len(times)), times),
        held_out=np.flatnonzero(held_out),
        repeated=np.flatnonzero(repeated),
        leaked=np.flatnonzero(leaked),
        not_chosen=np.flatnonzero(training & (times == 0)),
    )


def sample_documents(documents: Documents, number: int) -> np.ndarray:
    """Up to `number` different documents of a part, int64 indices in order. Of documents with the
    same tokens and mask one is taken: copies would make a small sample look large."""

    def content(i: int) -> bytes:
        return b"".join(values.tobytes() for values in documents[i])

    return sample(documents.content, number, content)


def sample(digests: np.ndarray, number: int, key: Callable[[int], Hashable | None]) -> np.ndarray:
    """Up to `number` indices with different keys, int64 in order.

    Args:
        digests: uint64; the smallest ones after hashing are chosen.
        number: the most indices to choose.
        key: maps an index to its key; None excludes the index.
    """
    found: dict[Hashable, int] = {}
    for i in np.argsort(_keyed(digests, _SAMPLE), kind="stable").tolist():
        if len(found) >= number:
            break
        if (value := key(i)) is not None:
            found.setdefault(value, i)
    return np.sort(np.fromiter(found.values(), np.int64))


def _hold_out(prompt: np.ndarray, candidates: np.ndarray, config: DataConfig) -> np.ndarray:
    """Mask of the documents to hold out, bool (num_documents,): whole prompts in the order of their
    digests, until there are at least as many documents as configured."""
    wanted = config.num_held_out or max(1, round(config.held_out_fraction * candidates.sum()))
    prompts, counts = np.unique(prompt[candidates], return_counts=True)
    enough = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
    held_out: np.ndarray = candidates & np.isin(prompt, prompts[:enough])
    return held_out


def _keyed(digests: np.ndarray, key: int) -> np.ndarray:
    """Digests hashed under a key, uint64: uniform, and independent for different keys."""
    return splitmix64(digests + np.uint64(key * GAMMA % 2**64))
