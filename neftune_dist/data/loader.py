"""Batches: the documents of one micro-batch as tensors, prepared a step ahead by a thread.

A `MicroBatch` is all that a forward pass, the loss and the noise need, the same under every engine.
An empty micro-batch is one token that nothing is learned from, so that every rank takes part in
every collective.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neftune_dist.config import Config
from neftune_dist.data.corpus import Documents
from neftune_dist.data.layout import lay_out
from neftune_dist.data.schedule import Schedule


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one rank. B rows of S tokens: B = 1 where documents are packed.

    input_ids, position_ids: int64 (B, S). attention_mask: int64 (B, S), None where packed.
    positions: int64 (num_supervised,), indices into the flattened (B * S) tokens whose successor is
        learned; targets: int64 (num_supervised,), those successors.
    lengths, documents, epochs: int64 (num_documents,), in order; none where the batch is empty.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    positions: Tensor
    targets: Tensor
    lengths: Tensor
    documents: Tensor
    epochs: Tensor
    # Known to the host without waiting for the device: lengths, or (1,) where the batch is empty.
    document_lengths: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


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
    rows = [documents[int(i)] for i in indices]
    if not rows:
        rows = [(np.zeros(1, np.int32), np.zeros(1, np.uint8))]
    lengths = [len(ids) for ids, _ in rows]
    width = sum(lengths) if packing else max(lengths)
    height = 1 if packing else len(rows)
    input_ids = np.zeros((height, width), np.int64)
    position_ids = np.zeros((height, width), np.int64)
    mask = np.zeros((height, width), np.int64)
    positions, targets = [], []
    start = 0
    for row, (ids, supervised) in enumerate(rows):
        line, column = (0, start) if packing else (row, 0)
        piece = slice(column, column + len(ids))
        input_ids[line, piece] = ids
        position_ids[line, piece] = np.arange(len(ids))
        mask[line, piece] = 1
        learned = np.flatnonzero(supervised)
        positions.append(line * width + column + learned - 1)
        targets.append(ids[learned].astype(np.int64))
        start += len(ids)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        attention_mask=None if packing else torch.from_numpy(mask),
        positions=torch.from_numpy(np.concatenate(positions)),
        targets=torch.from_numpy(np.concatenate(targets)),
        lengths=torch.tensor(lengths if len(indices) else [], dtype=torch.int64),
        documents=torch.from_numpy(np.asarray(indices, np.int64)),
        epochs=torch.from_numpy(np.asarray(epochs, np.int64)),
        document_lengths=tuple(lengths),
    )


class Loader:
    """Steps of one rank, from any step on; the next one is prepared while one is trained."""

    def __init__(
        self,
        documents: Documents,
        schedule: Schedule,
        config: Config,
        rank: int,
        world_size: int,
        quadratic_tokens: float,
    ) -> None:
        self.documents = documents
        self.schedule = schedule
        self.packing = config.data.packing
        self.micro_batch_tokens = config.train.micro_batch_tokens
        self.rank, self.world_size = rank, world_size
        self.quadratic_tokens = quadratic_tokens

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
        with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
            ahead = pool.submit(self.step, first) if first < self.schedule.num_steps else None
            for step in range(first, self.schedule.num_steps):
                assert ahead is not None
                batch = ahead.result()
                if step + 1 < self.schedule.num_steps:
                    ahead = pool.submit(self.step, step + 1)
                yield batch

    def _computed(self, lengths: np.ndarray) -> int:
        if len(lengths) == 0:
            return 1
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
