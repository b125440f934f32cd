"""Batches: the documents of one micro-batch as tensors, prepared some steps ahead by a thread.

A `MicroBatch` is all that a forward pass, the loss and the noise need, the same under every engine.
An empty micro-batch is two tokens that nothing is learned from, so that every rank takes part in
every collective; two, because torch.compile would compile once more for a dimension of size 1.

Ranks that share sequences (`engine.sequence_parallel`) take slices of one micro-batch: as many
tokens each, wherever documents begin and end. A packed micro-batch that has too few tokens for
equal slices, or for float8's tiles, ends with a tail of padding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from neftune_dist.config import Config
from neftune_dist.data.documents import Documents
from neftune_dist.data.packing import assign_documents
from neftune_dist.data.sampler import Sampler

_EMPTY_TOKENS = 2  # of an empty micro-batch
# The weights' gradients are products over the tokens, whose number float8 wants divisible by this.
_FLOAT8_TILE = 16
# Prepared beyond the one that is used: two outlast a single slow one.
_AHEAD = 2
_CPU = torch.device("cpu")
_Key = TypeVar("_Key")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank. B rows of S tokens: B = 1 where documents are packed.

    input_ids, position_ids: int64 (B, S). attention_mask: int64 (B, S), None where packed.
    positions: int64 (num_supervised,), indices into the flattened (B * S) tokens whose successor is
        learned; targets: int64 (num_supervised,), those successors.
    lengths, documents, epochs: int64 (num_documents,), in order; none where the batch is empty.
    segment, token_length: int64 (B * S,), index of each token's document among those, and that
        document's tokens; 0 at padding, and all of an empty batch is padding.
    cu_seqlens: int32 (num_documents + 1,), where each document begins and the last one ends; None
        where padded. The tokens of an empty batch count as one document: (0, S).
    tail: tokens of padding at the end of a packed batch, one more document in cu_seqlens.
    part: (index, count) of a slice. Its input_ids, position_ids, positions and targets are its own;
        segment and token_length too; documents, cu_seqlens and tail are those of the whole.
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
    # Known to the host without waiting for the device: lengths, or (S,) where the batch is empty.
    document_lengths: tuple[int, ...]
    tail: int = 0
    part: tuple[int, int] = (0, 1)

    @property
    def whole_tokens(self) -> int:
        """Of all slices, packed: S where there is but one."""
        return sum(self.document_lengths) + self.tail

    def slice(self, index: int, count: int) -> MicroBatch:
        """The `index`-th of `count` equal slices of a packed one, whose tokens they divide."""
        own = self.whole_tokens // count
        first, last = index * own, (index + 1) * own
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
        """The same batch on another device; pinned, the host does not wait for the copies."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """The same batch in memory that a GPU copies from by itself."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class StepBatch:
    """What one rank does in one step, and the step's totals over all ranks."""

    step: int
    micro_batches: list[MicroBatch]
    num_documents: int
    num_tokens: int
    num_supervised_tokens: int
    num_computed_tokens: int  # padding and empty micro-batches counted
    sum_squared_lengths: int  # for the attention's FLOPs


def token_multiple(config: Config) -> int:
    """What divides the number of tokens in each row of a rank's micro-batches."""
    return 1 if config.model.float8 == "none" else _FLOAT8_TILE


def collate(
    documents: Documents,
    indices: np.ndarray,
    epochs: np.ndarray,
    packing: bool,
    slices: int = 1,
    multiple: int = 1,
) -> MicroBatch:
    """The micro-batch of some documents; of none, an empty one.

    Args:
        indices, epochs: int64 (num_documents,).
        packing: one row of all documents; else a row each.
        slices: into how many equal ones a packed batch can be cut.
        multiple: what divides the tokens of each slice, or of each padded row.
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
    # The place of each token among the flattened rows.
    rows = 1 if packing else len(lengths)
    width = _row_width(lengths, packing, slices, multiple)
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


def _row_width(lengths: np.ndarray, packing: bool, slices: int, multiple: int) -> int:
    """Tokens of a row, padding counted."""
    tokens = int(lengths.sum() if packing else lengths.max())
    return tokens + -tokens % (slices * multiple)


class Loader:
    """Steps of one rank, from any step on; the next ones are prepared while one is trained.

    rank, world_size: of those that share no document. device: where they are trained on; for a GPU
    they are pinned. part: (index, count) of this rank's slice of each micro-batch.
    """

    def __init__(
        self,
        documents: Documents,
        sampler: Sampler,
        config: Config,
        rank: int,
        world_size: int,
        quadratic_tokens: float,
        device: torch.device = _CPU,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self.documents = documents
        self.sampler = sampler
        self.packing = config.data.packing
        self.micro_batch_tokens = config.train.micro_batch_tokens * part[1]
        self.rank, self.world_size = rank, world_size
        self.quadratic_tokens = quadratic_tokens
        self.device = device
        self.part = part
        self.multiple = token_multiple(config)

    def step(self, step: int) -> StepBatch:
        """This rank's part of a step: a pure function of the step."""
        indices, epochs = self.sampler.documents(step)
        lengths = self.documents.lengths[indices]
        rounds = assign_documents(
            lengths, self.world_size, self.micro_batch_tokens, self.packing, self.quadratic_tokens
        )
        mine = [np.array(groups[self.rank], dtype=np.int64) for groups in rounds]
        computed = sum(
            self._computed(lengths[list(group)]) for groups in rounds for group in groups
        )
        return StepBatch(
            step=step,
            micro_batches=[
                _own(
                    collate(
                        self.documents,
                        indices[group],
                        epochs[group],
                        self.packing,
                        self.part[1],
                        self.multiple,
                    ),
                    self.part,
                )
                for group in mine
            ],
            num_documents=len(indices),
            num_tokens=int(lengths.sum()),
            num_supervised_tokens=int(self.documents.num_supervised[indices].sum()),
            num_computed_tokens=computed,
            sum_squared_lengths=int((lengths**2).sum()),
        )

    def steps(self, first: int) -> Iterator[StepBatch]:
        """Steps from `first` to the sampler's last."""
        return _ahead(self._prepare, range(first, self.sampler.num_steps), self.device)

    def _prepare(self, step: int) -> StepBatch:
        batch = self.step(step)
        return replace(
            batch, micro_batches=[_ready(each, self.device) for each in batch.micro_batches]
        )

    def _computed(self, lengths: np.ndarray) -> int:
        slices = self.part[1]
        if len(lengths) == 0:
            lengths = np.array([_EMPTY_TOKENS * slices])
        rows = 1 if self.packing else len(lengths)
        return rows * _row_width(lengths, self.packing, slices, self.multiple)


def _own(batch: MicroBatch, part: tuple[int, int]) -> MicroBatch:
    return batch if part[1] == 1 else batch.slice(*part)


def _ready(batch: MicroBatch, device: torch.device) -> MicroBatch:
    return batch.pinned() if device.type == "cuda" else batch


def _ahead(
    make: Callable[[_Key], _Made], keys: Sequence[_Key], device: torch.device
) -> Iterator[_Made]:
    """What `make` makes of each key, in order; the next ones are made by a thread while one is
    used."""

    def enter_thread() -> None:
        if device.type == "cuda":
            # A thread begins on GPU 0: what it pins would take memory there on behalf of all ranks.
            torch.cuda.set_device(device)

    pool = ThreadPoolExecutor(1, "loader", initializer=enter_thread)
    try:
        made: deque[Future[_Made]] = deque()
        for i in range(len(keys) + _AHEAD):
            if i < len(keys):
                made.append(pool.submit(make, keys[i]))
            if i >= _AHEAD:
                yield made.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def evaluation_batches(
    documents: Documents,
    indices: np.ndarray,
    config: Config,
    rank: int,
    world_size: int,
    quadratic_tokens: float,
    device: torch.device = _CPU,
    part: tuple[int, int] = (0, 1),
) -> Iterator[MicroBatch]:
    """This rank's micro-batches over a fixed set of documents, laid out like a step and prepared
    ahead; the arguments as `Loader` takes them."""
    rounds = assign_documents(
        documents.lengths[indices],
        world_size,
        config.train.micro_batch_tokens * part[1],
        config.data.packing,
        quadratic_tokens,
    )
    multiple = token_multiple(config)

    def prepare(groups: Sequence[Sequence[int]]) -> MicroBatch:
        chosen = indices[list(groups[rank])]
        epochs = np.zeros_like(chosen)
        batch = collate(documents, chosen, epochs, config.data.packing, part[1], multiple)
        return _ready(_own(batch, part), device)

    return _ahead(prepare, rounds, device)
