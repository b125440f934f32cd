"""Batches: the documents of one micro-batch as tensors, prepared some steps ahead by a thread.

A `MicroBatch` is all that a forward pass, the loss and the noise need, the same under every engine.
An empty micro-batch is two tokens that nothing is learned from, so that every rank takes part in
every collective; two, because torch.compile would compile once more for a dimension of size 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neftune_dist.config import Config
from neftune_dist.data.documents import Documents
from neftune_dist.data.layout import lay_out
from neftune_dist.data.schedule import Schedule

_EMPTY_TOKENS = 2  # of an empty micro-batch
# Prepared beyond the one that is trained: two outlast a single slow one.
_STEPS_AHEAD = 2
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank. B rows of S tokens: B = 1 where documents are packed.

    input_ids, position_ids: int64 (B, S). attention_mask: int64 (B, S), None where packed.
    positions: int64 (num_supervised,), indices into the flattened (B * S) tokens whose successor is
        learned; targets: int64 (num_supervised,), those successors.
    lengths, documents, epochs: int64 (num_documents,), in order; none where the batch is empty.
    cu_seqlens: int32 (num_documents + 1,), where each document begins and the last one ends; None
        where padded. The tokens of an empty batch count as one document: (0, S).
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    targets: Tensor
    lengths: Tensor
    documents: Tensor
    epochs: Tensor
    cu_seqlens: Tensor | None
    # Known to the host without waiting for the device: lengths, or (S,) where the batch is empty.
    document_lengths: tuple[int, ...]

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


def collate(
    documents: Documents, indices: np.ndarray, epochs: np.ndarray, packing: bool
) -> MicroBatch:
    """The micro-batch of these documents, int64 (num_documents,) each; none gives an empty one."""
    if len(indices):
        lengths, (ids, supervised) = documents.lengths[indices], documents.gather(indices)
    else:
        lengths = np.array([_EMPTY_TOKENS])
        ids, supervised = np.zeros(_EMPTY_TOKENS, np.int32), np.zeros(_EMPTY_TOKENS, np.uint8)
    ends = np.cumsum(lengths)
    token = np.arange(len(ids))
    within = token - np.repeat(ends - lengths, lengths)
    # The place of each token among the flattened rows.
    rows, width = (1, len(ids)) if packing else (len(lengths), int(lengths.max()))
    place = token if packing else np.repeat(np.arange(rows) * width, lengths) + within
    input_ids, position_ids, mask = np.zeros((3, rows * width), np.int64)
    input_ids[place], position_ids[place], mask[place] = ids, within, 1
    learned = np.flatnonzero(supervised)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids.reshape(rows, width)),
        position_ids=torch.from_numpy(position_ids.reshape(rows, width)),
        attention_mask=None if packing else torch.from_numpy(mask.reshape(rows, width)),
        positions=torch.from_numpy(place[learned] - 1),
        targets=torch.from_numpy(ids[learned].astype(np.int64)),
        lengths=torch.from_numpy(lengths[: len(indices)]),
        documents=torch.from_numpy(np.asarray(indices, np.int64)),
        epochs=torch.from_numpy(np.asarray(epochs, np.int64)),
        cu_seqlens=torch.from_numpy(np.append(0, ends).astype(np.int32)) if packing else None,
        document_lengths=tuple(lengths.tolist()),
    )


class Loader:
    """Steps of one rank, from any step on; the next ones are prepared while one is trained.

    device: where they are trained on; for a GPU they are pinned.
    """

    def __init__(
        self,
        documents: Documents,
        schedule: Schedule,
        config: Config,
        rank: int,
        world_size: int,
        quadratic_tokens: float,
        device: torch.device = _CPU,
    ) -> None:
        self.documents = documents
        self.schedule = schedule
        self.packing = config.data.packing
        self.micro_batch_tokens = config.train.micro_batch_tokens
        self.rank, self.world_size = rank, world_size
        self.quadratic_tokens = quadratic_tokens
        self.device = device

    def step(self, step: int) -> StepBatch:
        """This rank's part of a step: a pure function of the step."""
        indices, epochs = self.schedule.documents(step)
        lengths = self.documents.lengths[indices]
        layout = lay_out(
            lengths, self.world_size, self.micro_batch_tokens, self.packing, self.quadratic_tokens
        )
        mine = [np.array(groups[self.rank], dtype=np.int64) for groups in layout.groups]
        computed = sum(
            self._computed(lengths[list(group)]) for groups in layout.groups for group in groups
        )
        return StepBatch(
            step=step,
            micro_batches=[
                collate(self.documents, indices[group], epochs[group], self.packing)
                for group in mine
            ],
            num_documents=len(indices),
            num_tokens=int(lengths.sum()),
            num_supervised_tokens=int(self.documents.num_supervised[indices].sum()),
            num_computed_tokens=computed,
            sum_squared_lengths=int((lengths**2).sum()),
        )

    def steps(self, first: int) -> Iterator[StepBatch]:
        """Steps from `first` to the schedule's last."""
        pool = ThreadPoolExecutor(1, "loader", initializer=self._enter_thread)
        try:
            ahead: deque[Future[StepBatch]] = deque()
            for step in range(first, self.schedule.num_steps + _STEPS_AHEAD):
                if step < self.schedule.num_steps:
                    ahead.append(pool.submit(self._prepare, step))
                if step >= first + _STEPS_AHEAD:
                    yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _enter_thread(self) -> None:
        if self.device.type == "cuda":
            # A thread begins on GPU 0: what it pins would take memory there on behalf of all ranks.
            torch.cuda.set_device(self.device)

    def _prepare(self, step: int) -> StepBatch:
        batch = self.step(step)
        if self.device.type == "cuda":
            batch = replace(batch, micro_batches=[m.pinned() for m in batch.micro_batches])
        return batch

    def _computed(self, lengths: np.ndarray) -> int:
        if len(lengths) == 0:
            return _EMPTY_TOKENS
        return int(lengths.sum() if self.packing else len(lengths) * lengths.max())


def evaluation_batches(
    documents: Documents,
    indices: np.ndarray,
    config: Config,
    rank: int,
    world_size: int,
    quadratic_tokens: float,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches over a fixed set of documents, laid out like a step."""
    layout = lay_out(
        documents.lengths[indices],
        world_size,
        config.train.micro_batch_tokens,
        config.data.packing,
        quadratic_tokens,
    )
    for groups in layout.groups:
        chosen = indices[list(groups[rank])]
        yield collate(documents, chosen, np.zeros_like(chosen), config.data.packing)
