"""Attention within documents that lie packed behind each other in one row.

Registered with transformers' attention interface under `VARLEN`; the lengths of the documents come
down to it as the forward argument `document_lengths`. No mask of tokens x tokens is ever built.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

VARLEN = "neftune_dist_varlen"


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    document_lengths: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself alone.

    Args:
        query: (1, num_heads, num_tokens, head_dim). key, value: (1, num_key_value_heads, ...).
        document_lengths: tokens of each document; they sum to num_tokens.

    Returns:
        (1, num_tokens, num_heads, head_dim), and no weights.
    """
    if document_lengths is None:
        raise RuntimeError(
            f"{type(module).__name__} did not hand document_lengths down to its attention: this "
            "model cannot be packed; set data.packing=false."
        )
    if softcap is not None:
        raise RuntimeError(
            "The model caps its attention logits, which packed attention does not do: set "
            "data.packing=false model.attention=eager."
        )
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(
        query.split(document_lengths, dim=2),
        key.split(document_lengths, dim=2),
        value.split(document_lengths, dim=2),
        strict=True,
    ):
        mask = None
        length = q.shape[2]
        if sliding_window is not None and length > sliding_window:
            index = torch.arange(length, device=q.device)
            distance = index[:, None] - index[None]
            mask = (distance >= 0) & (distance < sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(VARLEN, varlen_attention)


def implementation(attention: str, packing: bool) -> str:
    """transformers' name for `model.attention`: auto is varlen where packed, else sdpa."""
    if attention == "auto":
        return VARLEN if packing else "sdpa"
    return VARLEN if attention == "varlen" else attention
