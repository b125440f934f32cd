"""Which documents are trained on, how often, which are held out, and which are evaluated.

A pure function of the documents' digests and the settings: no generator is drawn from, and the
order of rows decides nothing but the order of documents. Chosen are those with the smallest digest,
so that more of them include those chosen before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from neftune_dist.config import DataConfig, SourceConfig, UserError
from neftune_dist.data.documents import Documents, DocumentStats

# Keys under which a document's digest is mixed again, so that two choices have nothing in common.
_CAP, _FRACTION, _SAMPLE = 1, 2, 3


@dataclass(frozen=True)
class Split:
    """train, held_out: int64, indices of documents; in `train`, one as often as an epoch has it.

    num_duplicates: documents that are there already. num_dropped_duplicates: of them, left out.
    num_leaked: left out because their prompt is one of the held-out source's. num_not_chosen: left
    out by `max_documents` or a weight below 1.
    """

    train: np.ndarray
    held_out: np.ndarray
    num_duplicates: int
    num_dropped_duplicates: int
    num_leaked: int
    num_not_chosen: int


def select(stats: DocumentStats, config: DataConfig, sources: Sequence[SourceConfig]) -> Split:
    """Choose among all documents.

    Args:
        sources: of the documents to train on; those of a source beyond them are held out.

    Raises:
        UserError: nothing is left to train on.
    """
    is_own = stats.source >= len(sources)  # of the held-out source
    _, first = np.unique(stats.content, return_index=True)
    repeated = ~is_own
    repeated[first] = False
    training = ~is_own
    if config.duplicates == "drop":
        training &= ~repeated
    num_candidates = int(training.sum())
    held_out, leaked = is_own, np.zeros_like(is_own)
    if config.held_out_source:
        leaked = training & np.isin(stats.prompt, stats.prompt[is_own])
    elif config.holds_out:
        held_out = _hold_out(stats.prompt, training, config)
    training &= ~held_out & ~leaked
    if not training.any():
        ways = ("num_held_out", "held_out_fraction", "held_out_source")
        way = next(each for each in ways if getattr(config, each))
        raise UserError(
            f"data.{way}={getattr(config, way)} leaves none of the {num_candidates} documents to "
            "train on."
        )
    times = np.zeros(len(stats.source), np.int64)
    for i, source in enumerate(sources):
        mine = np.flatnonzero(training & (stats.source == i))
        if 0 < source.max_documents < len(mine):
            order = np.argsort(_mixed(stats.content[mine], _CAP), kind="stable")
            mine = np.sort(mine[order[: source.max_documents]])
        whole, fraction = divmod(source.weight, 1)
        more = _mixed(stats.content[mine], _FRACTION) < np.uint64(fraction * 2**64)
        times[mine] = int(whole) + more
    train = np.repeat(np.arange(len(times)), times)
    if not len(train):
        raise UserError("The weights in data.mixture leave no document to train on: raise one.")
    return Split(
        train=train,
        held_out=np.flatnonzero(held_out),
        num_duplicates=int(repeated.sum()),
        num_dropped_duplicates=int(repeated.sum()) if config.duplicates == "drop" else 0,
        num_leaked=int(leaked.sum()),
        num_not_chosen=int((training & (times == 0)).sum()),
    )


def sample_documents(documents: Documents, number: int) -> np.ndarray:
    """Up to `number` different documents of a part, int64 indices in order: of all its sources, and
    of documents with the same tokens and mask one. Copies would let a small sample look large."""

    def content(i: int) -> bytes:
        return b"".join(values.tobytes() for values in documents[i])

    return sample(documents.content, number, content)


def sample(digests: np.ndarray, number: int, key: Callable[[int], Hashable | None]) -> np.ndarray:
    """Up to `number` indices with different keys, int64 in order.

    Args:
        digests: uint64; the smallest ones, mixed again, are chosen.
        key: of an index; None: it is not to be chosen.
    """
    found: dict[Hashable, int] = {}
    for i in np.argsort(_mixed(digests, _SAMPLE), kind="stable").tolist():
        if len(found) >= number:
            break
        if (its := key(i)) is not None:
            found.setdefault(its, i)
    return np.sort(np.fromiter(found.values(), np.int64))


def _hold_out(prompt: np.ndarray, candidates: np.ndarray, config: DataConfig) -> np.ndarray:
    """bool (num_documents,): whole prompts, in the order of their digests, until there are as many
    documents as were asked for."""
    wanted = config.num_held_out or max(1, round(config.held_out_fraction * candidates.sum()))
    prompts, counts = np.unique(prompt[candidates], return_counts=True)
    enough = int(np.searchsorted(np.cumsum(counts), wanted)) + 1
    held_out: np.ndarray = candidates & np.isin(prompt, prompts[:enough])
    return held_out


def _mixed(digests: np.ndarray, key: int) -> np.ndarray:
    """uint64, as evenly spread as the digests and independent of them: SplitMix64 (Steele, Lea,
    Flood, OOPSLA 2014)."""
    z = digests + np.uint64(key * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
