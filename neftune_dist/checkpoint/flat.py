"""Flat shards in PyTorch's distributed checkpoint format (DCP).

Every tensor is stored as ranges of its flattened self under `KIND/NAME`, so any engine at any world
size reads just the ranges it holds: no gather, no conversion, no whole tensor anywhere. DCP's own
planners assume whole `torch.Tensor`s or DTensors; the two here carry ranges.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from neftune_dist.config import UserError
from neftune_dist.engine.base import FlatShard


def write(folder: Path, shards: Sequence[FlatShard]) -> None:
    """Write this rank's shards: a collective of all ranks. Files are flushed to disk.

    Raises `dcp.CheckpointException` on every rank where any rank failed.
    """
    dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=_SavePlanner(shards))


def read(folder: Path, shards: Sequence[FlatShard], *, alone: bool = False) -> None:
    """Fill these shards' tensors from a checkpoint.

    Args:
        alone: without a process group (export); else a collective of all ranks.

    Raises:
        UserError: a tensor that is missing or of another size.
    """
    with warnings.catch_warnings():
        # DCP warns that it reads without a process group, which is what `alone` asks for.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(
            {},
            storage_reader=dcp.FileSystemReader(folder),
            planner=_LoadPlanner(shards),
            no_dist=alone,
        )


def tensors(folder: Path) -> dict[str, int]:
    """Key and number of elements of every tensor in a checkpoint."""
    metadata = dcp.FileSystemReader(folder).read_metadata()
    return {
        key: each.size.numel()
        for key, each in metadata.state_dict_metadata.items()
        if isinstance(each, TensorStorageMetadata)
    }


class _SavePlanner(SavePlanner):
    def __init__(self, shards: Sequence[FlatShard]) -> None:
        self.shards = {(s.key, s.start): s for s in shards}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(key, (start,)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(
                            torch.Size([start]), torch.Size([shard.tensor.numel()])
                        ),
                        properties=TensorProperties(dtype=shard.tensor.dtype),
                        size=torch.Size([shard.numel]),
                    ),
                )
                for (key, start), shard in self.shards.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, each in metadata.state_dict_metadata.items():
            assert isinstance(each, TensorStorageMetadata)
            covered = sum(chunk.sizes.numel() for chunk in each.chunks)
            if covered != each.size.numel():
                raise RuntimeError(
                    f"{key}: the ranks hold {covered} of {each.size.numel()} elements."
                )
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        index = write_item.index
        assert index.offset is not None
        return self.shards[index.fqn, index.offset[0]].tensor


class _LoadPlanner(LoadPlanner):
    def __init__(self, shards: Sequence[FlatShard]) -> None:
        self.shards = {(s.key, s.start): s for s in shards}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        assert metadata is not None
        self.stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for (key, start), shard in self.shards.items():
            stored = self.stored.get(key)
            if not isinstance(stored, TensorStorageMetadata):
                raise UserError(f"The checkpoint lacks the tensor {key}: it is of another model.")
            if stored.size.numel() != shard.numel:
                raise UserError(
                    f"The checkpoint's {key} has {stored.size.numel()} elements, the model's "
                    f"{shard.numel}: it is of another model."
                )
            chunk = ChunkStorageMetadata(torch.Size([start]), torch.Size([shard.tensor.numel()]))
            items += create_read_items_for_chunk_list(key, stored, [chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("flat checkpoints hold tensors only")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        assert index.offset is not None
        whole = self.shards[index.fqn, index.offset[0]].tensor
        return whole.narrow(0, read_item.dest_offsets[0], read_item.lengths[0])

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
