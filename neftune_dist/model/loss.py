"""The loss: a sum over supervised tokens, with logits computed for those alone."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def token_loss_sum(
    model: Any,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    document_lengths: tuple[int, ...],
    positions: Tensor,
    targets: Tensor,
) -> Tensor:
    """Sum of the cross-entropies of the targets, float32 scalar; 0 where there are none.

    Args:
        model: the causal LM as its engine wraps it. It is called like the plain one, so whatever a
            family does to its logits (scaling, capping) is done.
        input_ids, position_ids: (B, S). attention_mask: (B, S), or None: one row of packed
            documents with these document_lengths.
        positions: (num_supervised,), indices into the B * S tokens. targets: the tokens that
            follow them.
    """
    if attention_mask is None:
        # Packed: the vocabulary projection runs for the learned positions only.
        logits = model(
            input_ids=input_ids,
            position_ids=position_ids,
            document_lengths=document_lengths,
            logits_to_keep=positions,
            use_cache=False,
        ).logits[0]
    else:
        logits = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).logits.flatten(0, 1)[positions]
    return F.cross_entropy(logits.float(), targets, reduction="sum")
