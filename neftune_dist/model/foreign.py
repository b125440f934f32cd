"""Weights of other trainers' sharded checkpoints, readable by ranges: no rank holds them whole.

Two layouts: DeepSpeed's ZeRO checkpoints (any stage; the float32 masters are read) and PyTorch's
distributed checkpoints (DCP) of a plain state dict. Both are read without running code that they
carry. Refuses tensor-parallel ZeRO checkpoints (`UserError`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from neftune_dist.config import UserError
from neftune_dist.model.pickles import KnownReader, load_tensors
from neftune_dist.system.checkpoint_names import MANIFEST
from neftune_dist.system.text import first_line

_ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(frozen=True)
class Source:
    """A tensor in files.

    Attributes:
        shape: of the whole.
        read_rows: reads rows [first, last) of it; a scalar has one.
    """

    shape: tuple[int, ...]
    read_rows: Callable[[int, int], Tensor]


def open_weights(folder: Path) -> dict[str, Source] | None:
    """The weights in `folder` by name, or None where it is no checkpoint of these layouts."""
    if (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder} is a checkpoint of a run of this project: export the run, and take the "
            "weights of the export; or continue from it, with checkpoint.resume."
        )
    if (folder / ".metadata").is_file():
        with _explained(folder, "PyTorch's distributed"):
            return _by_every_suffix(_dcp_sources(folder))
    latest = folder / "latest"
    with _explained(folder, "DeepSpeed's ZeRO"):
        tagged = folder / latest.read_text().strip() if latest.is_file() else folder
    files = {
        int(match[1]): (file, int(match[2]))
        for file in sorted(tagged.glob("*_optim_states.pt"))
        if (match := _ZERO_FILE.fullmatch(file.name))
    }
    if not files:
        return None
    if any(model_rank for _, model_rank in files.values()):
        raise UserError(f"The ZeRO checkpoint {tagged} is tensor parallel: it cannot be read here.")
    with _explained(tagged, "DeepSpeed's ZeRO"):
        return _by_every_suffix(_zero_sources(tagged, [files[rank][0] for rank in sorted(files)]))


@contextmanager
def _explained(place: Path, layout: str) -> Iterator[None]:
    """Turn any exception that a foreign file causes in torch's readers and in the code here into a
    `UserError`: every field of it was written by another program."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{place} is no checkpoint of {layout} layout that can be read "
            f"({type(error).__name__}: {first_line(error)[:200]}): copy it again, or name another "
            "one."
        ) from error


def _by_every_suffix(sources: dict[str, Source]) -> dict[str, Source]:
    """Tensors by name, and by names without prefixes that trainers add (`model.`, `module.`,
    `state.app.`), unless that would be ambiguous."""
    found: dict[str, Source | None] = {}
    for name, tensor in sources.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            suffix = ".".join(parts[i:])
            found[suffix] = None if suffix in found else tensor
    return {**{k: v for k, v in found.items() if v is not None}, **sources}


def _load(file: Path) -> dict[str, Any]:
    with _explained(file, "DeepSpeed's ZeRO"):
        loaded: dict[str, Any] = load_tensors(file, ignored="deepspeed.")
        return loaded


def _zero_sources(folder: Path, files: Sequence[Path]) -> dict[str, Source]:
    states = [_load(file)["optimizer_state_dict"] for file in files]
    model = _load(min(folder.glob("*mp_rank_00_model_states.pt")))
    counts = states[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else counts
    if world_size != len(files):
        raise UserError(
            f"The ZeRO checkpoint {folder} has {len(files)} of {world_size} partitions."
        )
    by_stage_3 = "fp32_flat_groups" in states[0]
    sources: dict[str, Source] = {}
    offset = 0
    for group, shapes in enumerate(model["param_shapes"]):
        if by_stage_3:
            # Stage 3: every parameter is cut into equal parts, one a rank; a rank's parts follow
            # each other.
            streams = [state["fp32_flat_groups"] for state in states]
            paddings = [0] * len(shapes)
        else:
            # Stages 1 and 2: a group's parameters follow each other in one buffer, which is cut
            # into the ranks' parts.
            streams = [[state["single_partition_of_fp32_groups"][group] for state in states]]
            no_paddings = {group: [0] * len(shapes)}
            paddings = (states[0].get("param_alignment_paddings") or no_paddings)[group]
            offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            size = -(-math.prod(shape) // len(streams))
            parts = [_joined(stream, offset, offset + size) for stream in streams]
            sources[name] = _source(shape, [piece for part in parts for piece in part])
            offset += size + padding
    for alias, name in model.get("shared_params", {}).items():
        if name in sources:
            sources[alias] = sources[name]
    return sources


def _joined(parts: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Views of elements [start, stop) of flat tensors that follow each other."""
    sizes = [part.numel() for part in parts]
    return [parts[i][first:last] for i, first, last in ranges(sizes, start, stop)]


def ranges(sizes: Iterable[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Find elements [start, stop) in a sequence of flat tensors of these sizes.

    Yields:
        The index of each tensor that holds some of them, and the range within that tensor.
    """
    begin = 0
    for i, size in enumerate(sizes):
        first, last = max(start - begin, 0), min(stop - begin, size)
        if first < last:
            yield i, first, last
        begin += size


def _source(shape: Sequence[int], pieces: Sequence[Tensor]) -> Source:
    """A tensor from pieces of its flattened elements, the last of them perhaps padded."""
    row, held = math.prod(shape[1:]), sum(piece.numel() for piece in pieces)
    if held < math.prod(shape):
        raise ValueError(f"{held} of {math.prod(shape)} elements of a tensor are there")

    def read_rows(first: int, last: int) -> Tensor:
        none = pieces[0][:0]  # of no rows, whose dtype is asked for
        read = torch.cat([none, *_joined(pieces, first * row, last * row)])
        return read.view(last - first, *shape[1:]) if shape else read

    return Source(tuple(shape), read_rows)


def _dcp_sources(folder: Path) -> dict[str, Source]:
    reader = KnownReader(folder)
    return {
        name: Source(tuple(stored.size), partial(_read_dcp_rows, reader, name, stored))
        for name, stored in reader.metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def _read_dcp_rows(
    reader: KnownReader, name: str, stored: TensorStorageMetadata, first: int, last: int
) -> Tensor:
    size = [last - first, *stored.size[1:]] if stored.size else []
    offsets = [first, *[0] * (len(size) - 1)] if stored.size else []
    chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
    target = torch.empty(size, dtype=stored.properties.dtype)
    reader.load(_RowsPlanner(name, stored, chunk, target), alone=True)
    return target


class _RowsPlanner(DefaultLoadPlanner):
    """Loads a chunk of one tensor."""

    def __init__(
        self, name: str, stored: TensorStorageMetadata, chunk: ChunkStorageMetadata, target: Tensor
    ) -> None:
        super().__init__()
        self.name, self.stored, self.chunk, self.target = name, stored, chunk, target

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self.name, self.stored, [self.chunk]))

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target
