"""Attention over sequences that ranks share is that of one process, on any number of ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaConfig

from neftune_dist.model.attention import varlen_attention
from neftune_dist.model.ulysses import share_sequences
from tests.support.ranks import on_ranks

HEAD_DIM = 8
OWN_TOKENS = 5
# Heads, heads of keys, window, sinks, dropout (which drops next to nothing, by another way).
CASES: list[tuple[int, int, int | None, bool, float]] = [
    (4, 4, None, False, 0.0),
    (4, 2, None, False, 0.0),
    (4, 2, 3, True, 0.0),
    (4, 1, 3, True, 1e-9),
    (6, 3, None, False, 1e-9),
    (12, 4, None, True, 0.0),  # 6 ranks could not share 4 heads of keys evenly
]


def inputs(case: int, num_tokens: int) -> list[Tensor]:
    """Query, key, value, sinks, and the gradient of the result."""
    heads, shared, *_ = CASES[case]
    made = partial(torch.randn, generator=torch.Generator().manual_seed(case), dtype=torch.float64)
    tokens = [made(1, n, num_tokens, HEAD_DIM) for n in (heads, shared, shared)]
    return [*tokens, made(heads), made(1, num_tokens, heads, HEAD_DIM)]


def results(case: int, own: slice, num_tokens: int) -> dict[str, Tensor]:
    """Of this rank's tokens: what they attended to, and the gradients."""
    *given, grad = inputs(case, num_tokens)
    query, key, value, sinks = (
        tensor[:, :, own].requires_grad_() if tensor.dim() == 4 else tensor.requires_grad_()
        for tensor in given
    )
    _, _, window, has_sinks, dropout = CASES[case]
    out, _ = varlen_attention(
        nn.Module(),
        query,
        key,
        value,
        None,
        cu_seqlens=torch.tensor([0, 2, 9, num_tokens], dtype=torch.int32),
        max_seqlen=num_tokens,
        sliding_window=window,
        s_aux=sinks if has_sinks else None,
        dropout=dropout,
    )
    out.backward(grad[:, own])
    found = {"out": out.detach().transpose(1, 2), "query": query.grad}
    return {**found, "key": key.grad, "value": value.grad, "sinks": sinks.grad}


def on_a_rank(_folder: Path) -> list[Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    own, found = slice(rank * OWN_TOKENS, (rank + 1) * OWN_TOKENS), []
    for case, (heads, shared, *_) in enumerate(CASES):
        config = LlamaConfig(hidden_size=48, num_attention_heads=heads, num_key_value_heads=shared)
        share_sequences(dist.group.WORLD, config)
        found.append(results(case, own, size * OWN_TOKENS))
    return found


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 6])
def test_attention_of_shared_sequences_is_that_of_one_process(
    num_ranks: int, tmp_path: Path
) -> None:
    found, num_tokens = on_ranks(on_a_rank, num_ranks, tmp_path), num_ranks * OWN_TOKENS
    for case in range(len(CASES)):
        expected = results(case, slice(None), num_tokens)
        of_ranks = [rank[case] for rank in found]
        for name, whole in expected.items():
            parts = [part[name] for part in of_ranks]
            if whole is None:
                assert parts == [None] * num_ranks
            else:
                together = sum(parts) if name == "sinks" else torch.cat(parts, dim=2)
                torch.testing.assert_close(together, whole, rtol=1e-6, atol=1e-6)
