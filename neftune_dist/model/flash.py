"""PyTorch's FlashAttention for ragged batches on a GPU, version 3 or 4 where installed and fitting.

The operator of `varlen` attends by it there, block of queries by block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from neftune_dist.compat.torch import flash_attention, flash_attention_backward
from neftune_dist.model.ulysses import block_rows

# Versions of FlashAttention with kernels for a GPU's architecture, the fastest first.
_NEWER = {9: ("FA3", "FA4"), 10: ("FA4",)}


def varlen_kernel(device: torch.device, dtype: str, windowed: bool = False) -> str:
    """Activate the fastest installed kernel for `VARLEN` in this process; return its name.

    PyTorch's own is FlashAttention 2. Newer versions are separate packages.

    Args:
        windowed: whether a layer of the model has a sliding window, for which FlashAttention 4
            has no backward.
    """
    if device.type != "cuda":
        return "varlen (document by document, by FlashAttention for CPUs)"
    if dtype == "fp32":
        return "varlen (document by document: FlashAttention has no float32)"
    for name in _NEWER.get(torch.cuda.get_device_capability(device)[0], ()):
        # The package is missing or has no kernels for this GPU, or torch does not know it.
        unusable = (ImportError, ValueError, AttributeError, RuntimeError)
        if not (windowed and name == "FA4"):
            with suppress(*unusable):
                torch.nn.attention.activate_flash_attention_impl(name)
                return f"varlen ({name})"
    return "varlen (FA2)"


def flash_parts(
    cu_seqlens: Tensor, num_queries: int, _num_keys: int, blocks: Sequence[int]
) -> Iterator[tuple[slice, slice, tuple[Tensor, Tensor]]]:
    """For each block: the rows of its queries, the keys that they see, and cumulative lengths of
    queries and keys, in which documents before the block have keys alone.

    The lengths stay on the GPU: the host waits for nothing. FlashAttention's causal mask is aligned
    at the bottom right: a document's last query is at the position of its last key.
    """
    for row, first, end in block_rows(num_queries, blocks):
        if first < end:
            lengths = cu_seqlens.clamp(first, end) - first, cu_seqlens.clamp(max=end)
            yield slice(row, row + end - first), slice(end), lengths


def flash_attend(
    qkv: tuple[Tensor, ...],
    lengths: tuple[Tensor, Tensor],
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The attended values of a block, and their log-sum-exps."""
    longest = min(max_seqlen, len(qkv[0])), max_seqlen
    settings = 0.0, True, False  # no dropout, causal, no mask to return
    out, lse, *_ = flash_attention(
        *qkv, *lengths, *longest, *settings, scale=scale, **_window_sizes(window)
    )
    return out, lse


def flash_gradients(
    given: tuple[Tensor, ...],
    lengths: tuple[Tensor, Tensor],
    max_seqlen: int,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a block's queries, and of the keys and values that they see."""
    *tensors, lse = given
    grad = tensors[0]
    longest = min(max_seqlen, len(grad)), max_seqlen
    # No dropout, causal, and the state of a generator that dropout would use.
    seed = torch.zeros(2, dtype=torch.uint64, device=grad.device)
    settings = 0.0, True, seed, torch.empty(0, device=grad.device)
    tensors.append(lse.contiguous())
    found: tuple[Tensor, Tensor, Tensor] = flash_attention_backward(
        *tensors, *lengths, *longest, *settings, scale=scale, **_window_sizes(window)
    )
    return found


def _window_sizes(window: int) -> dict[str, int | None]:
    """FlashAttention's arguments for a window. None means no window: FlashAttention 4 refuses sizes
    in its backward."""
    if not window:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}
