"""Micro-batches: documents of one forward pass as tensors, prepared some steps ahead by a thread.

A `MicroBatch` holds all that a forward pass, the loss and the noise need, the same under every
engine. An empty micro-batch is two tokens without supervision, so that every rank takes part in
every collective; two, because torch.compile would compile once more for a dimension of size 1.

Ranks that share sequences (`engine.sequence_parallel`) take slices of one micro-batch, of equally
many tokens, wherever documents begin and end. A packed micro-batch with too few tokens for equal
slices, or for float8's tiles, ends with a tail of padding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from neftune_dist.config import Config
from neftune_dist.data.documents import Documents
from neftune_dist.data.packing import Rounds, assign_documents
from neftune_dist.data.sampler import Sampler
from neftune_dist.distributed.device import enter_thread

_EMPTY_TOKENS = 2  # of an empty micro-batch
# The weights' gradients are products over the tokens, whose number float8 needs divisible by this.
_FLOAT8_TILE = 16
# Steps prepared beyond the current one: two outlast a single slow one.
_STEPS_AHEAD = 2
_CPU = torch.device("cpu")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank. B rows of S tokens: B = 1 where documents are packed.

    Attributes:
        input_ids, position_ids: int64 (B, S).
        attention_mask: int64 (B, S); None where packed.
        positions: int64 (num_supervised,), indices into the flattened (B * S) tokens whose
            successor is supervised.
        targets: int64 (num_supervised,), those successors.
        lengths, documents, epochs: int64 (num_documents,), in order; empty in an empty batch.
        segment, token_length: int64 (B * S,), the index of the token's document among those, and
            the tokens of that document; 0 at padding. An empty batch is all padding.
        cu_seqlens: int32 (num_documents + 1,), where documents begin and the last one ends; None
            where padded. The tokens of an empty batch count as one document: (0, S).
        document_lengths: `lengths` known to the host without waiting for the device; (S,) in an
            empty batch.
        tail: tokens of padding at the end of a packed batch, one more document in cu_seqlens.
        part: (index, count) of a slice. Its input_ids, position_ids, positions, targets, segment
            and token_length are the slice's; documents, cu_seqlens and tail are the whole batch's.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    targets: Tensor
    lengths: Tensor
    documents: Tensor
    epochs: Tensor
    segment: Tensor
    token_length: Tensor
    cu_seqlens: Tensor | None
    document_lengths: tuple[int, ...]
    tail: int = 0
    part: tuple[int, int] = (0, 1)

    @property
    def whole_tokens(self) -> int:
        """Tokens of a packed batch over all its slices."""
        return sum(self.document_lengths) + self.tail

    def slice(self, index: int, count: int) -> MicroBatch:
        """Slice `index` of `count` equal ones of a packed batch, whose tokens `count` divides."""
        size = self.whole_tokens // count
        first, last = index * size, (index + 1) * size
        inside = (self.positions >= first) & (self.positions < last)
        return replace(
            self,
            input_ids=self.input_ids[:, first:last],
            position_ids=self.position_ids[:, first:last],
            positions=self.positions[inside] - first,
            targets=self.targets[inside],
            segment=self.segment[first:last],
            token_length=self.token_length[first:last],
            part=(index, count),
        )

    def to(self, device: torch.device) -> MicroBatch:
        """The batch on another device. The host does not wait for copies from pinned memory."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The batch in pinned memory, which a GPU copies from asynchronously."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class StepBatch:
    """The micro-batches of one rank in one step, and the step's totals over all ranks."""

    step: int
    micro_batches: list[MicroBatch]
    num_documents: int
    num_tokens: int
    num_supervised_tokens: int
    num_computed_tokens: int  # padding and empty micro-batches counted
    sum_squared_lengths: int  # for the attention's FLOPs


def token_multiple(config: Config) -> int:
    """The number that the tokens in a row of a rank's micro-batch must be a multiple of."""
    return 1 if config.model.float8 == "none" else _FLOAT8_TILE


def collate(
    documents: Documents,
    indices: np.ndarray,
    epochs: np.ndarray,
    packing: bool,
    slices: int = 1,
    multiple: int = 1,
) -> MicroBatch:
    """The micro-batch of some documents; an empty one without any.

    Args:
        documents: the part that `indices` point into.
        indices, epochs: int64 (num_documents,).
        packing: one row of all documents, instead of a row for every document.
        slices: the number of equal slices that a packed batch can be cut into.
        multiple: the tokens of every slice, or of a padded row, are a multiple of this.
    """
    if len(indices):
        lengths, (ids, supervised) = documents.lengths[indices], documents.gather(indices)
    else:
        empty = _EMPTY_TOKENS * slices
        lengths = np.array([empty])
        ids, supervised = np.zeros(empty, np.int32), np.zeros(empty, np.uint8)
    ends = np.cumsum(lengths)
    token = np.arange(len(ids))
    within = token - np.repeat(ends - lengths, lengths)
    # The place of every token among the flattened rows, (num_tokens,).
    rows = 1 if packing else len(lengths)
    width = _row_width(int(lengths.sum() if packing else lengths.max()), slices * multiple)
    tail = width - len(ids) if packing else 0
    place = token if packing else np.repeat(np.arange(rows) * width, lengths) + within
    input_ids, position_ids, mask, segment, token_length = np.zeros((5, rows * width), np.int64)
    input_ids[place], position_ids[place], mask[place] = ids, within, 1
    if len(indices):
        segment[place] = np.repeat(np.arange(len(lengths)), lengths)
        token_length[place] = np.repeat(lengths, lengths)
    learned = np.flatnonzero(supervised)
    boundaries = np.concatenate([[0], ends, [len(ids) + tail] * bool(tail)])
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.reshape(rows, width)),
        position_ids=torch.from_numpy(position_ids.reshape(rows, width)),
        attention_mask=None if packing else torch.from_numpy(mask.reshape(rows, width)),
        positions=torch.from_numpy(place[learned] - 1),
        targets=torch.from_numpy(ids[learned].astype(np.int64)),
        lengths=torch.from_numpy(lengths[: len(indices)]),
        documents=torch.from_numpy(np.asarray(indices, np.int64)),
        epochs=torch.from_numpy(np.asarray(epochs, np.int64)),
        segment=torch.from_numpy(segment),
        token_length=torch.from_numpy(token_length),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)) if packing else None,
        document_lengths=tuple(lengths.tolist()),
        tail=tail,
    )


def _row_width(tokens: int, multiple: int) -> int:
    """Tokens of a row, padded to a multiple."""
    return tokens + -tokens % multiple


@dataclass(frozen=True)
class BatchLayout:
    """What decides the micro-batches of a rank, beside the documents.

    Attributes:
        config: of the run.
        rank, world_size: among ranks that do not share documents.
        quadratic_tokens: as `assign_documents` takes it.
        device: where the batches are trained on; for a GPU they are pinned.
        part: (index, count) of this rank's slice of a micro-batch.
    """

    config: Config
    rank: int
    world_size: int
    quadratic_tokens: float
    device: torch.device = _CPU
    part: tuple[int, int] = (0, 1)

    def assign(self, lengths: np.ndarray) -> Rounds:
        """The places of documents of these lengths in micro-batches, over all ranks."""
        tokens, packing = self.config.train.micro_batch_tokens, self.config.data.packing
        tokens *= self.part[1]
        return assign_documents(lengths, self.world_size, tokens, packing, self.quadratic_tokens)

    def micro_batch(
        self, documents: Documents, indices: np.ndarray, epochs: np.ndarray
    ) -> MicroBatch:
        """This rank's slice of the micro-batch of some documents."""
        packing, multiple = self.config.data.packing, token_multiple(self.config)
        batch = collate(documents, indices, epochs, packing, self.part[1], multiple)
        own = batch if self.part[1] == 1 else batch.slice(*self.part)
        return own.pinned() if self.device.type == "cuda" else own

    def num_computed_tokens(self, lengths: np.ndarray, rounds: Rounds) -> int:
        """Tokens of all ranks' micro-batches of documents of these lengths, padding included."""
        packing, slices, known = self.config.data.packing, self.part[1], lengths.tolist()
        total, multiple = 0, slices * token_multiple(self.config)
        for group in chain.from_iterable(rounds):
            of_group = [known[i] for i in group] or [_EMPTY_TOKENS * slices]
            num_rows, tokens = (1, sum(of_group)) if packing else (len(of_group), max(of_group))
            total += num_rows * _row_width(tokens, multiple)
        return total


class Loader:
    """The steps of one rank, from any step on; the next ones are prepared during the current one.

    Args:
        documents: the training part.
        sampler: the documents of every step.
        layout: decides the micro-batches.
    """

    def __init__(self, documents: Documents, sampler: Sampler, layout: BatchLayout) -> None:
        self.documents, self.sampler, self.layout = documents, sampler, layout

    def step(self, step: int) -> StepBatch:
        """This rank's part of a step: a pure function of the step."""
        documents, layout = self.documents, self.layout
        indices, epochs = self.sampler.documents(step)
        lengths = documents.lengths[indices]
        rounds = layout.assign(lengths)
        own = [np.array(groups[layout.rank], dtype=np.int64) for groups in rounds]
        return StepBatch(
            step=step,
            micro_batches=[layout.micro_batch(documents, indices[g], epochs[g]) for g in own],
            num_documents=len(indices),
            num_tokens=int(lengths.sum()),
            num_supervised_tokens=int(documents.num_supervised[indices].sum()),
            num_computed_tokens=layout.num_computed_tokens(lengths, rounds),
            sum_squared_lengths=int((lengths**2).sum()),
        )

    def steps(self, first: int) -> Iterator[StepBatch]:
        """Steps from `first` to the sampler's last."""
        return _prefetch(self.step, range(first, self.sampler.num_steps), self.layout.device)


def evaluation_batches(
    documents: Documents, indices: np.ndarray, layout: BatchLayout
) -> Iterator[MicroBatch]:
    """This rank's micro-batches over a fixed set of documents, assigned like those of a step and
    prepared ahead.

    Args:
        documents, indices: int64 (num_documents,) in that part.
        layout: decides the micro-batches.
    """

    def prepare(groups: Sequence[Sequence[int]]) -> MicroBatch:
        chosen = indices[list(groups[layout.rank])]
        return layout.micro_batch(documents, chosen, np.zeros_like(chosen))

    return _prefetch(prepare, layout.assign(documents.lengths[indices]), layout.device)


def _prefetch(
    make: Callable[[_Key], _Value], keys: Sequence[_Key], device: torch.device
) -> Iterator[_Value]:
    """`make(key)` of every key, in order; a thread makes the next ones while one is used."""

    pool = ThreadPoolExecutor(1, "loader", enter_thread, (device,))
    try:
        pending: deque[Future[_Value]] = deque()
        for i in range(len(keys) + _STEPS_AHEAD):
            if i < len(keys):
                pending.append(pool.submit(make, keys[i]))
            if i >= _STEPS_AHEAD:
                yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
