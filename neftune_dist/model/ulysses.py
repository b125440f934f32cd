"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509), on any number of ranks.

Ranks that share a micro-batch hold one slice of its tokens; all layers but attention need no more.
Around attention two all-to-all exchanges turn slices of tokens with all heads into all tokens with
a share of the heads, and back: within attention a rank has whole sequences.

Where the heads cannot be dealt to all ranks, several ranks get the same heads: each has all keys
and values of these heads, and a part of their queries. Part j of the queries is the j-th block of
every slice, so that all of these ranks have early and late tokens, and as much to compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from neftune_dist.compat.torch import all_to_all


@dataclass(frozen=True)
class _Sharing:
    """How a group of ranks shares sequences.

    Attributes:
        group: the ranks. Rank r has group r // num_parts of the heads, and of their queries part
            r % num_parts.
        num_head_groups: number of equal groups that the heads are divided into.
        num_parts: number of ranks that have the same heads.
    """

    group: dist.ProcessGroup
    num_head_groups: int
    num_parts: int


# None: this rank has whole sequences. A global of the process, because attention is called deep
# within a model, which has no argument for a process group.
_sharing: _Sharing | None = None


def share_sequences(group: dist.ProcessGroup | None, hf_config: Any) -> None:
    """Let every later packed attention of this process exchange slices within `group`."""
    global _sharing
    if group is None:
        _sharing = None
        return
    config, size = hf_config.get_text_config(), group.size()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    # A group of query heads has the same number of key heads as any other, or shares one of them.
    num_groups = max(
        number
        for number in range(1, math.gcd(size, heads) + 1)
        if not (size % number or heads % number or (shared % number and number % shared))
    )
    _sharing = _Sharing(group, num_groups, size // num_groups)


def to_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange slices of tokens with all heads for all tokens with this rank's heads.

    Args:
        query, key, value: (1, heads, own_tokens, head_dim); heads may be fewer for key and value.

    Returns:
        Keys and values (1, heads / groups, num_tokens, head_dim), and the queries of the blocks of
        `query_blocks`. The given ones where nothing is shared.
    """
    if _sharing is None:
        return query, key, value
    groups, parts = _sharing.num_head_groups, _sharing.num_parts
    _, heads, own_tokens, dim = query.shape
    block = -(-own_tokens // parts)
    blocks = F.pad(query, (0, 0, 0, block * parts - own_tokens))
    blocks = blocks.view(groups, heads // groups, parts, block, dim).permute(0, 2, 3, 1, 4)
    return _exchange_tokens(blocks.flatten(0, 1)), _whole(key), _whole(value)


def query_blocks(own_tokens: int) -> list[int]:
    """The tokens whose queries `to_heads` gives to this rank: one block of every slice.

    Returns:
        First token and end of each block, one after the other, counted in the whole sequence; empty
        where the rank has all queries. In the queries a block is filled up to own_tokens /
        num_parts, rounded up.
    """
    if _sharing is None or _sharing.num_parts == 1:
        return []
    block = -(-own_tokens // _sharing.num_parts)
    first = min(_sharing.group.rank() % _sharing.num_parts * block, own_tokens)
    end = min(first + block, own_tokens)
    return [i * own_tokens + at for i in range(_sharing.group.size()) for at in (first, end)]


def block_rows(num_queries: int, blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """For each block of queries: its first row, its first token, and the end of its tokens."""
    rows_of_block = num_queries // (len(blocks) // 2)
    for i, (first, end) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        yield i * rows_of_block, first, end


def own_heads(per_head: Tensor) -> Tensor:
    """This rank's part of a tensor (heads,), as `to_heads` deals heads."""
    if _sharing is None:
        return per_head
    return per_head.chunk(_sharing.num_head_groups)[_sharing.group.rank() // _sharing.num_parts]


def to_slices(attended: Tensor, own_tokens: int) -> Tensor:
    """Exchange back: (1, queries, heads / groups, head_dim) to (1, own_tokens, heads, head_dim)."""
    if _sharing is None:
        return attended
    groups, parts, size = _sharing.num_head_groups, _sharing.num_parts, _sharing.group.size()
    _, num_queries, heads, dim = attended.shape
    block = num_queries // size
    # By rank, that is by group of heads and part: (size, block, heads / groups, dim).
    found = _exchange(attended.reshape(size, block, heads, dim))
    found = found.view(groups, parts, block, heads, dim).permute(1, 2, 0, 3, 4)
    return found.reshape(1, parts * block, groups * heads, dim)[:, :own_tokens]


def _whole(tensor: Tensor) -> Tensor:
    """All tokens of this rank's heads of keys or values."""
    assert _sharing is not None
    groups, parts = _sharing.num_head_groups, _sharing.num_parts
    _, heads, own_tokens, dim = tensor.shape
    tensor = tensor.repeat_interleave(max(1, groups // heads), dim=1)
    dealt = tensor.view(groups, -1, own_tokens, dim).repeat_interleave(parts, dim=0)
    return _exchange_tokens(dealt.transpose(1, 2))


def _exchange_tokens(sent: Tensor) -> Tensor:
    """Send what rank i needs of this slice, (size, tokens, heads, dim); return what all slices have
    for this rank, (1, heads, size * tokens, dim)."""
    return _exchange(sent).flatten(0, 1)[None].transpose(1, 2)


def _exchange(sent: Tensor) -> Tensor:
    """Send part i of dimension 0 to rank i; part i of the result is from rank i."""
    assert _sharing is not None
    flat = sent.contiguous().flatten(0, 1)
    return all_to_all(flat, _sharing.group).view(sent.shape)
