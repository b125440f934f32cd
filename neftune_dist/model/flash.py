"""PyTorch's FlashAttention for ragged batches on a GPU, version 3 or 4 where installed and fitting.

What the operator of `varlen` calls there, and which version it is.
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


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator on a GPU. FlashAttention's results have the query's strides, but `register_fake`
    promises contiguous ones to compiled graphs. So they are copied where the query was put together
    from parts, as in Phi and GPT-NeoX."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, cu_queries: Tensor, cu_keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = flash_attention(
            query,
            key,
            value,
            cu_queries,
            cu_keys,
            min(max_seqlen, len(query)),
            max_seqlen,
            0.0,
            True,
            False,
            scale=scale,
            **_window_sizes(window),
        )
        return out, lse

    if not blocks:
        out, lse = attend(query, key, value, cu_seqlens, cu_seqlens)
        return out.contiguous(), lse
    out, lse = query.new_zeros(query.shape), empty_lse(query).zero_()
    for rows, end, ends in _flash_blocks(cu_seqlens, len(query), blocks):
        out[rows], lse[:, rows] = attend(query[rows], key[:end], value[:end], *ends)
    return out, lse


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int,
    blocks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients on a GPU, contiguous."""

    def gradients(*given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = flash_attention_backward(
            *given,
            min(max_seqlen, len(given[0])),
            max_seqlen,
            0.0,
            True,
            torch.zeros(2, dtype=torch.uint64, device=query.device),  # of dropout, which is 0
            torch.empty(0, device=query.device),
            scale=scale,
            **_window_sizes(window),
        )
        return found

    if not blocks:
        found = gradients(grad, query, key, value, out, lse, cu_seqlens, cu_seqlens)
        dq, dk, dv = (part.contiguous() for part in found)
        return dq, dk, dv
    dq, dk, dv = query.new_zeros(query.shape), zero_sum(key, blocks), zero_sum(value, blocks)
    for rows, end, ends in _flash_blocks(cu_seqlens, len(query), blocks):
        of_rows = grad[rows], query[rows], key[:end], value[:end], out[rows]
        dq[rows], part_k, part_v = gradients(*of_rows, lse[:, rows].contiguous(), *ends)
        dk[:end] += part_k
        dv[:end] += part_v
    return dq, dk.to(key.dtype), dv.to(value.dtype)


def _flash_blocks(
    cu_seqlens: Tensor, num_queries: int, blocks: Sequence[int]
) -> Iterator[tuple[slice, int, tuple[Tensor, Tensor]]]:
    """For each block: the rows of its queries, the end of the keys that they see, and cumulative
    lengths of queries and keys, in which documents before the block have keys alone.

    Nothing waits for the lengths. FlashAttention takes the last query for that of the last key.
    """
    for row, first, end in block_rows(num_queries, blocks):
        if first < end:
            lengths = cu_seqlens.clamp(first, end) - first, cu_seqlens.clamp(max=end)
            yield slice(row, row + end - first), end, lengths


def _window_sizes(window: int) -> dict[str, int | None]:
    """FlashAttention's arguments for a window. None means no window: FlashAttention 4 refuses sizes
    in its backward."""
    if not window:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}


def zero_sum(tensor: Tensor, blocks: Sequence[int] | None) -> Tensor:
    """A gradient of zeros; in float32 at least where several blocks add to it."""
    dtype = torch.promote_types(tensor.dtype, torch.float32) if blocks else tensor.dtype
    return tensor.new_zeros(tensor.shape, dtype=dtype)


def empty_lse(query: Tensor) -> Tensor:
    """Room for log-sum-exps, (num_heads, num_queries)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty((query.shape[1], query.shape[0]), dtype=dtype)
