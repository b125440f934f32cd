"""Sequence parallelism by all-to-all (DeepSpeed-Ulysses, arXiv 2309.14509).

Ranks that share a micro-batch hold one slice of its tokens; all layers but attention need no more.
Around attention two all-to-all exchanges turn slices of tokens with all heads into all tokens with
a share of the heads, and back: within attention a rank has whole sequences.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from neftune_dist.compat.torch import all_to_all
from neftune_dist.config import UserError

# Ranks that share this one's sequences; None: it has them alone. A global of the process, because
# attention is called deep within a model, which has no argument for a group.
_group: dist.ProcessGroup | None = None


def share_sequences(group: dist.ProcessGroup | None, hf_config: Any) -> None:
    """Let every later packed attention of this process exchange slices within `group`.

    Raises:
        UserError: the number of ranks does not divide the model's heads.
    """
    global _group
    _group = group
    if group is None:
        return
    config, size = hf_config.get_text_config(), group.size()
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (shared % size and size % shared):
        raise UserError(
            f"engine.sequence_parallel={size} deals attention heads to {size} ranks, and the model "
            f"has {heads} heads over {shared} of keys: take a number that divides them."
        )


def to_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Exchange slices of tokens with all heads for all tokens with this rank's heads.

    Args:
        tensors: (1, heads, own_tokens, head_dim); where heads are fewer than ranks, several ranks
            get the same head.

    Returns:
        Tensors (1, heads / ranks, num_tokens, head_dim); the given ones where nothing is shared.
    """
    return tensors if _group is None else tuple(map(_to_heads, tensors))


def own_heads(per_head: Tensor) -> Tensor:
    """This rank's part of a tensor (heads,), as `to_heads` deals heads."""
    if _group is None:
        return per_head
    return per_head.chunk(_group.size())[_group.rank()]


def to_slices(attended: Tensor) -> Tensor:
    """Exchange back: (1, num_tokens, heads / ranks, head_dim) to (1, own_tokens, heads,
    head_dim)."""
    if _group is None:
        return attended
    size = _group.size()
    _, num_tokens, heads, dim = attended.shape
    sent = attended.reshape(size, num_tokens // size, heads, dim)
    # By rank, that is by group of heads: (size, own_tokens, heads, dim).
    found = _exchange(sent).transpose(0, 1)
    return found.reshape(1, num_tokens // size, size * heads, dim)


def _to_heads(tensor: Tensor) -> Tensor:
    assert _group is not None
    size = _group.size()
    _, heads, own_tokens, dim = tensor.shape
    if heads < size:
        tensor, heads = tensor.repeat_interleave(size // heads, dim=1), size
    sent = tensor.view(size, heads // size, own_tokens, dim).transpose(1, 2)
    # By rank, that is by slice: (size, own_tokens, heads / size, dim).
    found = _exchange(sent).reshape(1, size * own_tokens, heads // size, dim)
    return found.transpose(1, 2)


def _exchange(sent: Tensor) -> Tensor:
    """Send part i of dimension 0 to rank i; part i of the result is from rank i."""
    flat = sent.contiguous().flatten(0, 1)
    assert _group is not None
    return all_to_all(flat, _group).view(sent.shape)
