"""The operator `neftune_dist::add_noise_`: draw, scale, mask and add, in place, in one pass.

Registered with torch, so that `torch.compile` keeps it as one node. Its result is a pure function
of its arguments: counters are tensors, so nothing recompiles when they move on, and a pass that is
computed twice adds the same noise twice. On a GPU it is one Triton kernel; on the CPU it works
through pieces that stay in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neftune_dist.compat.torch import backward_id
from neftune_dist.noise.law import (
    MAX_HIDDEN_SIZE,
    RankStream,
    SampleStream,
    key_words,
    scalar,
    scales,
)
from neftune_dist.noise.layout import TokenLayout
from neftune_dist.noise.philox import philox4x32_, to_draws

_PIECE_COUNTERS = 1 << 16  # counters drawn at a time on the CPU: 512 KiB a word


@torch.library.custom_op("neftune_dist::add_noise_", mutates_args=("x",))
def add_noise_(
    x: Tensor,
    scale: Tensor,
    word0: Tensor,
    word1: Tensor,
    word2: Tensor,
    word3: Tensor,
    seed: int,
    distribution: str,
) -> Tensor:
    """x += scale * u, in float32, rounded once to x's dtype; where scale is 0, x keeps its bits.

    Args:
        x: (rows, columns, hidden_size) of any floating dtype and any strides. The token (i, j) is
            number `i columns + j`.
        scale: float32 (num_tokens,).
        word0, word1, word2, word3: int64 (num_tokens,), the counters of `law`.
        seed: the generator's key, below 2^63.
        distribution: uniform, gaussian or symmetric.

    Returns:
        float32 (num_tokens,): the squared L2 norm of the change of a token's embedding.
    """
    if x.shape[-1] > MAX_HIDDEN_SIZE:
        raise ValueError(f"A hidden size of {x.shape[-1]} is beyond the noise stream's 2^17.")
    words = (word0, word1, word2, word3)
    if x.device.type == "cuda":
        # Imported here: only machines with a GPU have Triton.
        from neftune_dist.noise.kernel import launch

        return launch(x, scale, words, seed, distribution)
    squares = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.float32, device=x.device)
    columns = x.shape[1]
    if x.stride(0) == columns * x.stride(1):  # the rows lie one after another: one long row
        x = x.as_strided((1, x.shape[0] * columns, x.shape[2]), (0, *x.stride()[1:]))
        columns = x.shape[1]
    blocks = -(-x.shape[2] // 4)
    step = max(1, min(columns, _PIECE_COUNTERS // blocks))
    # Allocated once: to allocate and free it for every piece costs more than the noise.
    memory = torch.empty(6, step, blocks, dtype=torch.int64, device=x.device)
    draws = torch.empty(step, blocks, 4, device=x.device)
    for row in range(x.shape[0]):
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            tokens = slice(row * columns + start, row * columns + stop)
            squares[tokens] = _add_piece_(
                x[row, start:stop],
                scale[tokens, None],
                [word[tokens, None] for word in words],
                key_words(seed),
                distribution,
                memory[:, : stop - start],
                draws[: stop - start],
            )
    return squares


@add_noise_.register_fake
def _(x: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(scale)


@torch.library.custom_op("neftune_dist::count_forward_", mutates_args=("clock",))
def count_forward_(clock: Tensor) -> Tensor:
    """Count one noised forward.

    An operator, so that a compiled graph checks its conditions when it runs.

    Args:
        clock: int64 (3,): the step; micro-steps and noised forwards since it was set.

    Returns:
        The clock before.
    """
    if backward_id() != -1:  # within a backward
        raise RuntimeError(
            "Activation checkpointing recomputes a compiled model together with its input "
            "embedding, whose noise would be another: checkpoint the layers alone."
        )
    before = clock.clone()
    clock[1:] += 1
    return before


@count_forward_.register_fake
def _(clock: Tensor) -> Tensor:
    return torch.empty_like(clock)


def _add_piece_(
    x: Tensor,
    scale: Tensor,
    words: list[Tensor],
    key: tuple[int, int],
    distribution: str,
    memory: Tensor,
    draws: Tensor,
) -> Tensor:
    """`add_noise_` for some tokens, on the CPU.

    Args:
        x: (num_tokens, hidden_size).
        scale, words: (num_tokens, 1).
        memory: int64 (6, num_tokens, num_blocks), to work in.
        draws: float32 (num_tokens, num_blocks, 4), to work in.
    """
    noised = scale != 0
    if not bool(noised.any()):
        return torch.zeros(len(x), dtype=torch.float32, device=x.device)
    for place, word in zip(memory, words, strict=False):  # two of the six hold no counter
        place.copy_(word)
    memory[1] += torch.arange(memory.shape[2], device=x.device)
    to_draws(philox4x32_(memory.unbind(), key), distribution, draws)
    noise = draws.view(len(x), -1)[:, : x.shape[1]].mul_(scale)
    before = x.to(torch.float32)
    after = noise.add_(before).to(x.dtype)
    if not bool(noised.all()):
        after = torch.where(noised, after, x)
    squares = (after.to(torch.float32) - before).square_().sum(1)
    squares = torch.where(noised[:, 0], squares, 0.0)  # inf - inf is NaN
    x.copy_(after)  # last: where x is float32, before is x itself
    return squares


def add_noise(
    x: Tensor,
    layout: TokenLayout,
    stream: RankStream | SampleStream,
    alpha: float | Tensor,
    *,
    distribution: str = "uniform",
    embed_scale: float = 1.0,
    row_length: int | None = None,
    num_segments: int | None = None,
) -> Tensor:
    """Add the law's noise to embeddings in place; return the squared norm of each document's noise.

    Args:
        x: (rows, columns, hidden_size), or (num_tokens, hidden_size); any floating dtype.
        alpha, embed_scale, row_length: as for `law.scales`.
        num_segments: above every segment of the layout; None: x's number of tokens.

    Returns:
        float64 (num_segments,): at index i, of document i of the batch, the squared L2 norm of its
        noise divided by embed_scale; 0 beyond the number of documents. The bits do not depend on
        the order in which a device adds them up.
    """
    scale = scales(layout, x.shape[-1], alpha, embed_scale=embed_scale, row_length=row_length)
    rows = x if x.dim() == 3 else x[None]
    squares = add_noise_(rows, scale, *stream.words(layout), stream.seed, distribution)
    strength = scalar(alpha, torch.float64, x.device)
    unit = (strength * embed_scale).square().clamp_min(1e-300)
    # Summed as integers, so that the order of the additions does not matter: a token's share of
    # (alpha embed_scale)^2 in units of 2^-40.
    share = (squares / unit * 2.0**40).clamp_max(2.0**60).to(torch.int64)
    share = torch.where(layout.length > 0, share, 0)
    total = share.new_zeros(num_segments or len(share)).index_add(0, layout.segment, share)
    return total.to(torch.float64) * 2.0**-40 * strength.square()
