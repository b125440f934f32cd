"""Pickles of torch and of its distributed checkpoints (DCP), read without running code.

A pickle is a program that may call anything Python can import. DCP describes a checkpoint in one,
`.metadata`, and torch reads it freely. Here it may name the dozen classes that DCP writes and
nothing else, within bounds of time and memory; what comes out is checked before anyone uses it.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlanner

from neftune_dist.compat.dcp import MemoryFormat, StorageInfo
from neftune_dist.config import UserError
from neftune_dist.config.limits import limited
from neftune_dist.system.text import first_line

# Bounds for reading a pickle: memory and time, each with an allowance for its size. A few bytes of
# a pickle make an object of some hundred bytes.
_GIB, _GIB_A_BYTE = 1.0, 100 / 2**30
_SECONDS, _BYTES_A_SECOND = 60.0, 2e6
_SHARD_BYTES_A_SECOND = 2e7  # of the tensors' files, for a slow disk
_DIRECTORY_BYTES = 2**16  # at the end of a tensor's file: the list of its parts

_CLASSES = (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    StorageInfo,
    MemoryFormat,
)


def _layout(name: str) -> torch.layout:
    """The memory layout of a tensor, for which DCP calls a function of torch."""
    _require(name == "torch.strided")
    return torch.strided


def _memory_format(owner: Any, name: Any) -> Any:
    """A memory format by its name, for which early versions of Python 3.11 call `getattr`."""
    _require(owner is MemoryFormat and name in MemoryFormat.__members__)
    return MemoryFormat[name]


_ALLOWED: dict[tuple[str, str], Any] = {
    **{(known.__module__, known.__name__): known for known in _CLASSES},
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): _layout,
    ("builtins", "getattr"): _memory_format,
    # The folder that the checkpoint was written to, which nobody reads.
    **{
        (module, name): PurePosixPath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
    },
}


class KnownReader(dcp.FileSystemReader):
    """A reader of DCP that reads a checkpoint's description once, however often it loads tensors.

    Raises:
        UserError: the description is damaged, or would run code.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder / ".metadata")
        self.metadata.storage_meta = StorageMeta(load_id=self.load_id)

    def load(self, planner: LoadPlanner, *, alone: bool) -> None:
        """Load the tensors that a planner asks for.

        Args:
            alone: without a process group; otherwise a collective of all ranks.

        Raises:
            UserError: of the planner, or for a file that cannot be read.
        """
        with warnings.catch_warnings():
            # DCP warns that it reads without a process group; `alone` asks for that.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            try:
                dcp.load({}, storage_reader=self, planner=planner, no_dist=alone)
            except dcp.CheckpointException as error:
                causes = [failure[0] for failure in error.failures.values()]
                known = next((str(c) for c in causes if isinstance(c, UserError)), None)
                raise UserError(
                    known or f"The checkpoint {self.path} cannot be read: {first_line(causes[0])}."
                ) from error

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description that was read when this was made."""
        return self.metadata

    def read_data(self, plan: Any, planner: Any) -> Any:
        """Load the planned tensors within a time limit."""
        num_bytes = sum(self.storage_data[item.storage_index].length for item in plan.items)
        with limited(_SECONDS + num_bytes / _SHARD_BYTES_A_SECOND, math.inf):
            return super().read_data(plan, planner)

    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        part = super()._slice_file(file, sinfo)
        part.seek(max(0, sinfo.length - _DIRECTORY_BYTES))
        check_stored(io.BytesIO(part.read()))
        part.seek(0)
        return part


def read_metadata(path: Path) -> Metadata:
    """Read DCP's description of a checkpoint.

    Raises:
        UserError: it is missing, damaged, or names an object that DCP does not write.
    """
    try:
        content = path.read_bytes()
        seconds = _SECONDS + len(content) / _BYTES_A_SECOND
        with limited(seconds, _GIB + len(content) * _GIB_A_BYTE), _unchanged_classes():
            found = _Unpickler(io.BytesIO(content)).load()
        _check(found)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # with damaged arguments, the classes raise many types
        raise UserError(
            f"{path} does not describe a distributed checkpoint and is not used: "
            f"{first_line(error)}."
        ) from error
    assert isinstance(found, Metadata)
    return found


def load_tensors(file: Path, ignored: str = "") -> Any:
    """Load a file of `torch.save`, tensors memory-mapped; refuse names that torch does not know.

    Args:
        ignored: objects whose class names begin so are loaded empty; "": none.

    Raises:
        Exception: the file is damaged, would run code or take too long; of many types.
    """
    check_stored(file)
    size = file.stat().st_size
    with limited(_SECONDS, _GIB + 2 * size / 2**30):  # it is mapped into memory, up to twice
        stand_ins: list[Any] = []
        if ignored:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            stand_ins = [(_Ignored, name) for name in names if name.startswith(ignored)]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


class _Ignored:
    """Stands in for a class whose content is not needed."""

    def __init__(self, *_: Any) -> None:
        pass


def check_stored(file: IO[bytes] | Path) -> None:
    """Refuse a file of `torch.save` whose parts are compressed, which torch never writes: a small
    file could then fill any memory.

    Raises:
        ValueError: they are, or it is no such file.
    """
    try:
        with zipfile.ZipFile(file) as parts:
            compressed = [part for part in parts.infolist() if part.compress_type]
    except zipfile.BadZipFile as error:
        raise ValueError("it is cut off, or no file of torch.save (since torch 1.6)") from error
    if compressed:
        raise ValueError("its parts are compressed")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Look up an object that a pickle names, if it may."""
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it would use {module}.{name}, as no checkpoint does")


@contextmanager
def _unchanged_classes() -> Iterator[None]:
    """Undo and refuse changes of the classes themselves, which all later code shares."""
    shared = [*_CLASSES, *MemoryFormat]
    before = [dict(vars(owner)) for owner in shared]
    try:
        yield
    finally:
        changed = [
            (owner, was)
            for owner, was in zip(shared, before, strict=True)
            if {**vars(owner)} != was
        ]
        for owner, was in changed:
            for name in vars(owner).keys() - was.keys():
                delattr(owner, name)
            for name, value in was.items():
                if vars(owner)[name] is not value:
                    set_on = object if isinstance(owner, Enum) else type
                    set_on.__setattr__(owner, name, value)
        if changed:
            raise pickle.UnpicklingError("it would change the classes that it names")


def _check(found: Any) -> None:
    """Refuse a description whose parts are not of the types that DCP writes, or that names a file
    outside its folder. Raises `ValueError`, `TypeError` or `AttributeError`."""
    _require(isinstance(found, Metadata) and isinstance(found.state_dict_metadata, dict))
    for key, stored in found.state_dict_metadata.items():
        _require(type(key) is str)
        if type(stored) is BytesStorageMetadata:
            continue
        _require(type(stored) is TensorStorageMetadata and type(stored.size) is torch.Size)
        _require(isinstance(stored.properties.dtype, torch.dtype))
        _require(type(stored.chunks) is list)
        for chunk in stored.chunks:
            _require(type(chunk.offsets) is torch.Size and type(chunk.sizes) is torch.Size)
            _require(len(chunk.offsets) == len(chunk.sizes) == len(stored.size))
            pieces = zip(chunk.offsets, chunk.sizes, stored.size, strict=True)
            _require(
                all(start >= 0 and 0 <= size <= whole - start for start, size, whole in pieces)
            )
        # DCP leaves what no chunk covers as it is: memory without content.
        held, numel = sum(chunk.sizes.numel() for chunk in stored.chunks), stored.size.numel()
        if held != numel:
            raise ValueError(f"it has {held} of the {numel} elements of {key!a}")
    _require(isinstance(found.storage_data, dict))
    for index, place in found.storage_data.items():
        _require(type(index) is MetadataIndex and type(index.fqn) is str)
        _require(type(place) is StorageInfo and type(place.relative_path) is str)
        _require(type(place.offset) is int and type(place.length) is int)
        _require(place.offset >= 0 and place.length >= 0)
        path = PurePosixPath(place.relative_path)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it names {place.relative_path!a}, outside the checkpoint")


def _require(sound: bool) -> None:
    if not sound:
        raise ValueError("a part of it is of no type that a checkpoint has")
