"""Weights of other trainers' sharded checkpoints, readable by ranges: no rank holds them whole.

Two layouts: DeepSpeed's ZeRO checkpoints (any stage; the float32 masters are read) and PyTorch's
distributed checkpoints (DCP) of a plain state dict. Both are read without running code that they
carry. Refuses tensor-parallel ZeRO checkpoints (`UserError`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from neftune_dist.config import UserError
from neftune_dist.model.pickles import KnownReader, load_tensors
from neftune_dist.system.text import first_line

_ZERO_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


@dataclass(frozen=True)
class Slice:
    """One stored tensor; indexing it by rows reads those rows."""

    shape: tuple[int, ...]
    read_rows: Callable[[int, int], Tensor]

    def get_shape(self) -> list[int]:
        """The shape of the whole tensor."""
        return list(self.shape)

    def __getitem__(self, rows: slice) -> Tensor:
        return self.read_rows(rows.start, rows.stop)


class ForeignWeights:
    """The tensors of a foreign checkpoint, by name: looks like a safetensors file."""

    def __init__(self, slices: dict[str, Slice]) -> None:
        self._slices = slices

    def keys(self) -> Iterator[str]:
        """Names of the tensors."""
        return iter(self._slices)

    def get_slice(self, name: str) -> Slice:
        """One tensor, unread."""
        return self._slices[name]

    def get_tensor(self, name: str) -> Tensor:
        """One tensor, whole."""
        whole = self._slices[name]
        return whole[0 : whole.shape[0] if whole.shape else 1]


def open_weights(folder: Path) -> ForeignWeights | None:
    """The weights in `folder`, or None where it is no checkpoint of these layouts."""
    if (folder / ".metadata").is_file():
        with _explained(folder, "PyTorch's distributed"):
            return ForeignWeights(_by_every_suffix(_dcp_slices(folder)))
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
        slices = _zero_slices(tagged, [files[rank][0] for rank in sorted(files)])
        return ForeignWeights(_by_every_suffix(slices))


@contextmanager
def _explained(folder: Path, layout: str) -> Iterator[None]:
    """Turn any exception that a foreign file causes in torch's readers and in the code here into a
    `UserError`: every field of it was written by another program."""
    try:
        yield
    except UserError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        failures = getattr(error, "failures", None)  # of ranks, of which there is one
        cause = next(iter(failures.values()))[0] if failures else error
        reason = first_line(cause)
        raise UserError(
            f"{folder} is no checkpoint of {layout} layout that can be read "
            f"({type(cause).__name__}: {reason[:200]}): copy it again, or name another one."
        ) from error


def _by_every_suffix(slices: dict[str, Slice]) -> dict[str, Slice]:
    """Slices by name, and by names without prefixes that trainers add (`model.`, `module.`,
    `state.app.`), unless that would be ambiguous."""
    found: dict[str, Slice | None] = {}
    for name, tensor in slices.items():
        parts = name.split(".")
        for i in range(1, len(parts)):
            suffix = ".".join(parts[i:])
            found[suffix] = None if suffix in found else tensor
    return {**{k: v for k, v in found.items() if v is not None}, **slices}


def _load(file: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = load_tensors(file, ignored="deepspeed.")
    except Exception as error:  # kinds of damage raise many types
        raise UserError(
            f"{file} cannot be read as a part of a ZeRO checkpoint: {first_line(error)}"
        ) from error
    return loaded


def _zero_slices(folder: Path, files: Sequence[Path]) -> dict[str, Slice]:
    states = [_load(file)["optimizer_state_dict"] for file in files]
    model = _load(min(folder.glob("*mp_rank_00_model_states.pt")))
    counts = states[0]["partition_count"]
    world_size = max(counts) if isinstance(counts, list) else counts
    if world_size != len(files):
        raise UserError(
            f"The ZeRO checkpoint {folder} has {len(files)} of {world_size} partitions."
        )
    by_stage_3 = "fp32_flat_groups" in states[0]
    slices: dict[str, Slice] = {}
    offset = 0
    for group, shapes in enumerate(model["param_shapes"]):
        if by_stage_3:
            # Every parameter is cut in equal parts; a rank's parts follow each other.
            ranks = [state["fp32_flat_groups"] for state in states]
            paddings = [0] * len(shapes)
        else:
            # A group's parameters follow each other, and the whole is cut into the ranks' parts.
            parts = [state["single_partition_of_fp32_groups"][group] for state in states]
            paddings = (states[0].get("param_alignment_paddings") or {group: [0] * len(shapes)})[
                group
            ]
            offset = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            numel = math.prod(shape)
            if by_stage_3:
                size = -(-numel // world_size)
                pieces = [(_joined(flat, offset, offset + size)) for flat in ranks]
                slices[name] = _slice(shape, [piece for rank in pieces for piece in rank])
                offset += size
            else:
                slices[name] = _slice(shape, _joined(parts, offset, offset + numel))
                offset += numel + padding
    for alias, name in model.get("shared_params", {}).items():
        if name in slices:
            slices[alias] = slices[name]
    return slices


def _joined(parts: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Views of elements [start, stop) of flat tensors that follow each other."""
    found, begin = [], 0
    for part in parts:
        first, last = max(start - begin, 0), min(stop - begin, part.numel())
        if first < last:
            found.append(part[first:last])
        begin += part.numel()
    return found


def _slice(shape: Sequence[int], pieces: Sequence[Tensor]) -> Slice:
    """A tensor from pieces of its flattened elements, the last of them perhaps padded."""
    row, held = math.prod(shape[1:]), sum(piece.numel() for piece in pieces)
    if held < math.prod(shape):
        raise ValueError(f"{held} of {math.prod(shape)} elements of a tensor are there")

    def read_rows(first: int, last: int) -> Tensor:
        none = pieces[0][:0]  # of no rows, whose dtype is asked for
        read = torch.cat([none, *_joined(pieces, first * row, last * row)])
        return read.view(last - first, *shape[1:]) if shape else read

    return Slice(tuple(shape), read_rows)


def _dcp_slices(folder: Path) -> dict[str, Slice]:
    reader = KnownReader(folder)
    metadata = reader.metadata
    return {
        name: Slice(tuple(stored.size), _dcp_rows(reader, name, stored))
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def _dcp_rows(
    reader: KnownReader, name: str, stored: TensorStorageMetadata
) -> Callable[[int, int], Tensor]:
    def read_rows(first: int, last: int) -> Tensor:
        size = [last - first, *stored.size[1:]] if stored.size else []
        offsets = [first, *[0] * (len(size) - 1)] if stored.size else []
        target = torch.empty(size, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(size))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            planner = _RowsPlanner(name, stored, chunk, target)
            with _explained(Path(reader.path), "PyTorch's distributed"):
                dcp.load({}, storage_reader=reader, planner=planner, no_dist=True)
        return target

    return read_rows


class _RowsPlanner(LoadPlanner):
    """Loads some rows of one tensor."""

    def __init__(
        self, name: str, stored: TensorStorageMetadata, chunk: ChunkStorageMetadata, target: Tensor
    ) -> None:
        self.name, self.stored, self.chunk, self.target = name, stored, chunk, target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        pass

    def create_local_plan(self) -> LoadPlan:
        return LoadPlan(create_read_items_for_chunk_list(self.name, self.stored, [self.chunk]))

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise AssertionError("only tensors are asked for")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        piece = self.target
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            piece = piece.narrow(dim, start, length)
        return piece

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass
