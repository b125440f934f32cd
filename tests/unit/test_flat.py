"""Ranges of flat tensors, written and read without a process group."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neftune_dist.checkpoint import flat
from neftune_dist.config import UserError
from neftune_dist.engine.base import MASTER, FlatShard

TENSORS = {name: torch.arange(n) + n / 7 for name, n in (("a", 50), ("b", 1), ("c", 33))}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of `TENSORS`."""
    flat.write(
        tmp_path,
        [FlatShard(MASTER, name, 0, tensor, tensor.numel()) for name, tensor in TENSORS.items()],
    )
    return tmp_path


def test_any_range_is_read_with_one_read_of_metadata(
    folder: Path, metadata_reads: list[Path]
) -> None:
    """Of many ranks the description is hundreds of megabytes; export reads a tensor at a time."""
    reader = flat.Reader(folder, alone=True)
    assert reader.tensors == {f"{MASTER}/{name}": t.numel() for name, t in TENSORS.items()}
    for name, whole in TENSORS.items():
        numel = whole.numel()
        for start, stop in ((0, numel), (numel // 3, numel // 2 + 1), (numel - 1, numel)):
            part = FlatShard(MASTER, name, start, torch.empty(stop - start), numel)
            reader.read([part])
            assert torch.equal(part.tensor, whole[start:stop]), name
    assert metadata_reads == [folder]


def test_tensor_of_another_model_is_refused(folder: Path) -> None:
    reader = flat.Reader(folder, alone=True)
    with pytest.raises(UserError, match=r"lacks the tensor master/d"):
        reader.read([FlatShard(MASTER, "d", 0, torch.empty(1), 1)])
    with pytest.raises(UserError, match=r"master/c has 33 elements, the model's 34"):
        reader.read([FlatShard(MASTER, "c", 0, torch.empty(34), 34)])


def test_missing_range_is_refused(tmp_path: Path) -> None:
    whole = TENSORS["a"]
    for missing in (slice(1, 50), slice(0, 49)):
        part = FlatShard(MASTER, "a", missing.start, whole[missing], 50)
        with pytest.raises(OSError, match=r"master/a: the ranks hold 49 of 50 elements"):
            flat.write(tmp_path, [part])
    halves = [FlatShard(MASTER, "a", i, whole[i : i + 25], 50) for i in (0, 25)]
    flat.write(tmp_path, halves)


def test_ranges_longer_than_a_piece_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat, "_PIECE_ELEMENTS", 7)
    whole = TENSORS["a"]
    halves = [FlatShard(MASTER, "a", i, whole[i : i + 25], 50) for i in (0, 25)]
    written = flat.write(tmp_path, halves)
    assert {name: flat.WrittenFile.of(tmp_path / name) for name in written} == written
    assert written.keys() == {path.name for path in tmp_path.iterdir()}
    read = FlatShard(MASTER, "a", 3, torch.empty(40), 50)
    flat.Reader(tmp_path, alone=True).read([read])
    assert torch.equal(read.tensor, whole[3:43])


def test_written_file_is_counted_and_hashed_in_bytes(tmp_path: Path) -> None:
    files = flat._HashingFileSystem()
    with files.create_stream(tmp_path / "a", "wb") as stream:
        stream.write(b"head")
        stream.write(memoryview(np.arange(5, dtype=np.float32)))  # 20 bytes in 5 elements
    assert files.written["a"] == flat.WrittenFile.of(tmp_path / "a")
    assert files.written["a"].size == 24
