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
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each document to itself alone.

    Args:
        query: (1, num_heads, num_tokens, head_dim). key, value: (1, num_key_value_heads, ...).
        document_lengths: tokens of each document; they sum to num_tokens.
        sliding_window: tokens that a token sees, itself counted.

    Returns:
        (1, num_tokens, num_heads, head_dim), and no weights.

    Raises:
        RuntimeError: the model asks for more than that (a mask, capped logits, attention sinks).
    """
    refused = {
        "hands no document_lengths to": document_lengths is None,
        "hands a mask to": attention_mask is not None,
        "caps the logits of": softcap is not None,
        "uses attention sinks in": s_aux is not None,
        "lets tokens see later ones in": not getattr(module, "is_causal", True),
    }
    for what, is_so in refused.items():
        if is_so:
            raise RuntimeError(
                f"{type(module).__name__} {what} its attention: documents of this model cannot be "
                "packed; set data.packing=false."
            )
    assert document_lengths is not None
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
        attended = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        outputs.append(attended.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(VARLEN, varlen_attention)


def implementation(attention: str, packing: bool) -> str:
    """transformers' name for `model.attention`: auto is varlen where packed, else sdpa."""
    if attention == "auto":
        return VARLEN if packing else "sdpa"
    return VARLEN if attention == "varlen" else attention
