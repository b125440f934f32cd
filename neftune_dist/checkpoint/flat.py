"""Flat shards in PyTorch's distributed checkpoint format (DCP).

Every tensor is stored as ranges of its flattened self under `KIND/NAME`, so any engine at any world
size reads just the ranges it holds: no gather, no conversion, no whole tensor anywhere. DCP's own
planners assume whole `torch.Tensor`s or DTensors; the two here carry ranges.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from neftune_dist.config import UserError
from neftune_dist.engine.base import FlatShard
from neftune_dist.model.pickles import KnownReader
from neftune_dist.optim.param_slice import Moment
from neftune_dist.optim.quantized_state import QuantizedMoment
from neftune_dist.system.garbage import without_collecting

# Largest item of a file: reading a range takes this much memory beside the range.
_PIECE_ELEMENTS = 1 << 24


def write(
    folder: Path, shards: Sequence[FlatShard], group: dist.ProcessGroup | None = None
) -> dict[str, WrittenFile]:
    """Write this rank's shards, and sync its files: a collective of the group.

    Returns:
        The files that this rank wrote, by name.

    Raises:
        OSError: on every rank, where any rank could not write, or the ranks' ranges do not cover
            every tensor.
    """
    writer = dcp.FileSystemWriter(folder)
    writer.fs = hashing = _HashingFileSystem()
    try:
        dcp.save({}, storage_writer=writer, planner=_SavePlanner(shards), process_group=group)
    except dcp.CheckpointException as error:
        causes = [failure[0] for failure in error.failures.values()]
        reasons = {getattr(cause, "strerror", None) or str(cause) for cause in causes}
        raise OSError("; ".join(sorted(reasons))) from error
    return hashing.written


@dataclass(frozen=True)
class WrittenFile:
    """A file's size in bytes and its 128-bit xxh3 checksum."""

    size: int
    xxh3: str

    @staticmethod
    def of(path: Path) -> WrittenFile:
        """Read a file on disk. Raises `OSError`."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, xxhash.xxh3_128)
            return WrittenFile(file.tell(), digest.hexdigest())

    def is_at(self, path: Path) -> bool:
        """Whether the file on disk can be read and has these bytes."""
        try:
            return WrittenFile.of(path) == self
        except OSError:
            return False


class Reader(KnownReader):
    """A checkpoint's tensors. Their description is read once.

    Args:
        alone: without a process group (export); otherwise reading is a collective of all ranks.
    """

    def __init__(self, folder: Path, *, alone: bool = False) -> None:
        self._alone = alone
        # Many ranks' shards are described by millions of small objects; scanning them again and
        # again takes 20 times as long as making them.
        with without_collecting():
            super().__init__(folder)

    @property
    def tensors(self) -> dict[str, int]:
        """Key and number of elements of every tensor."""
        return {
            key: stored.size.numel()
            for key, stored in self.metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }

    def read(self, shards: Sequence[FlatShard]) -> None:
        """Fill these shards' tensors.

        Raises:
            UserError: a tensor that is missing or of another size, or a file that cannot be read.
        """
        with without_collecting():
            self.load(_LoadPlanner(shards), alone=self._alone)


class _HashingFileSystem(FileSystem):
    """Files whose bytes are counted and hashed on their way to disk."""

    def __init__(self) -> None:
        self.written: dict[str, WrittenFile] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        with _HashedStream(path) as stream:
            try:
                yield stream
            except Exception as error:
                # Torch's error for a failed write names its own bookkeeping, not the disk.
                raise (stream.error or error) from error
        self.written[Path(path).name] = WrittenFile(stream.size, stream.digest.hexdigest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _HashedStream(io.BufferedWriter):
    """A new file; the bytes that are written to it, from its beginning to its end, are hashed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(io.FileIO(path, "w"))
        self.size, self.digest = 0, xxhash.xxh3_128()
        self.error: OSError | None = None  # the first that the file gave

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.size += written
        self.digest.update(data)
        return written

    def fileno(self) -> int:
        self.flush()  # torch syncs the file that it asks for
        return super().fileno()


class _SavePlanner(DefaultSavePlanner):
    def __init__(self, shards: Sequence[FlatShard]) -> None:
        super().__init__()
        self.pieces = {
            (shard.key, shard.start + i): (shard, i)
            for shard in shards
            for i in range(0, shard.tensor.numel(), _PIECE_ELEMENTS)
        }

    def create_local_plan(self) -> SavePlan:
        return SavePlan(
            [
                WriteItem(
                    index=MetadataIndex(key, (start,)),
                    type=WriteItemType.SHARD,
                    tensor_data=TensorWriteData(
                        chunk=ChunkStorageMetadata(
                            torch.Size([start]),
                            torch.Size([min(_PIECE_ELEMENTS, shard.tensor.numel() - i)]),
                        ),
                        properties=TensorProperties(dtype=shard.tensor.dtype),
                        size=torch.Size([shard.numel]),
                    ),
                )
                for (key, start), (shard, i) in self.pieces.items()
            ]
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(all_plans)
        for key, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            covered = sum(chunk.sizes.numel() for chunk in stored.chunks)
            if covered != stored.size.numel():
                raise RuntimeError(
                    f"{key}: the ranks hold {covered} of {stored.size.numel()} elements."
                )
        return plans, metadata

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        shard, i = self.pieces[index.fqn, index.offset[0]]
        return shard.tensor[i : i + _PIECE_ELEMENTS]  # decodes 8-bit moments, piece by piece


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self, shards: Sequence[FlatShard]) -> None:
        super().__init__()
        self.shards = {(s.key, s.start): s for s in shards}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for (key, start), shard in self.shards.items():
            stored = self.metadata.state_dict_metadata.get(key)
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

    def lookup_tensor(self, index: MetadataIndex) -> Any:
        assert index.offset is not None
        return self.shards[index.fqn, index.offset[0]].tensor

    def transform_tensor(self, read_item: ReadItem, tensor: Moment) -> Tensor:
        if isinstance(tensor, QuantizedMoment):  # encoded by `commit_tensor`
            return torch.empty(read_item.lengths)
        piece: Tensor = super().transform_tensor(read_item, tensor)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        whole = self.lookup_tensor(read_item.dest_index)
        if isinstance(whole, QuantizedMoment):
            whole.write(read_item.dest_offsets[0], tensor)
