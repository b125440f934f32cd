"""A copy of the engine's state in host memory, filled again by every save.

It is one mapping of exactly the bytes needed: torch's own pinned memory comes in powers of two (99
GiB for 75 at 7B) and takes 0.4 s a GiB. Threads pin the memory, which lets a GPU copy at full rate,
beside the first steps: they touch its pages and register them with CUDA piece by piece.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from neftune_dist.distributed.device import enter_thread
from neftune_dist.engine.base import FlatShard
from neftune_dist.optim.quantized_state import QuantizedMoment

# Tensors begin at multiples of this many bytes, as torch aligns them.
_ALIGNMENT = 64
# Bytes to touch and register at a time, and the threads that do so.
_PIECE_BYTES, _NUM_THREADS = 1 << 30, 8


class HostCopy:
    """Memory for the shards' content.

    Args:
        shards: to be copied; `copy` is called with the same ones.
        device: of the engine; on a GPU the memory is pinned.
    """

    def __init__(self, shards: Sequence[FlatShard], device: torch.device) -> None:
        self._device, self._offset = device, 0
        held = [part for shard in shards for part in _tensors(shard)]
        num_bytes = sum(_aligned(part.nbytes) for part in held)
        self._memory = mmap.mmap(-1, max(1, num_bytes))
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._copies: list[Any] = [shard.empty_copy(self._allocate) for shard in shards]
        self._pinning: list[Future[bool]] = []
        if device.type == "cuda":
            self._pin()

    def copy(self, shards: Sequence[FlatShard]) -> list[FlatShard]:
        """The shards as they are now, in host memory."""
        if self._pinning:
            wait(self._pinning)
        copies = []
        for shard, copied in zip(shards, self._copies, strict=True):
            copied.copy_(shard.tensor, non_blocking=True)
            copies.append(replace(shard, tensor=copied))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return copies

    def _allocate(self, like: Tensor) -> Tensor:
        """The next part of the memory, as a tensor of the shape and dtype of `like`."""
        first = self._offset
        self._offset += _aligned(like.nbytes)
        return self._bytes[first : first + like.nbytes].view(like.dtype).view(like.shape)

    def _pin(self) -> None:
        pool = ThreadPoolExecutor(_NUM_THREADS, "pin", enter_thread, (self._device,))
        pieces = self._bytes.split(_PIECE_BYTES)
        self._pinning = [pool.submit(_register, piece) for piece in pieces]
        pool.shutdown(wait=False)
        # At the end of the process the driver unregisters it by itself.
        weakref.finalize(self, _unregister, self._pinning, pieces).atexit = False


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _tensors(shard: FlatShard) -> Iterable[Tensor]:
    held = shard.tensor
    return (held.codes, held.scales) if isinstance(held, QuantizedMoment) else (held,)


def _register(piece: Tensor) -> bool:
    """Give the piece its pages, then lock them; whether that worked."""
    piece[:: mmap.PAGESIZE].zero_()
    return int(torch.cuda.cudart().cudaHostRegister(piece.data_ptr(), piece.nbytes, 0)) == 0


def _unregister(pinning: Sequence[Future[bool]], pieces: Sequence[Tensor]) -> None:
    for done, piece in zip(pinning, pieces, strict=True):
        if done.result():
            torch.cuda.cudart().cudaHostUnregister(piece.data_ptr())
