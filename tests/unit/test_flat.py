"""Ranges of flat tensors, written and read without a process group."""

from __future__ import annotations

from pathlib import Path

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
        [FlatShard(MASTER, name, 0, each, each.numel()) for name, each in TENSORS.items()],
    )
    return tmp_path


def test_any_range_is_read_and_the_description_once(
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


def test_what_is_of_another_model_is_refused(folder: Path) -> None:
    reader = flat.Reader(folder, alone=True)
    with pytest.raises(UserError, match=r"lacks the tensor master/d"):
        reader.read([FlatShard(MASTER, "d", 0, torch.empty(1), 1)])
    with pytest.raises(UserError, match=r"master/c has 33 elements, the model's 34"):
        reader.read([FlatShard(MASTER, "c", 0, torch.empty(34), 34)])
