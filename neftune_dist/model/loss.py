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
    kind = (
        {"document_lengths": document_lengths}
        if attention_mask is None
        else {"attention_mask": attention_mask}
    )

    # `logits_to_keep` would do for one row; rows of a padded batch keep different positions.
    def keep_supervised(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].flatten(0, 1)[positions][None],)

    with model.get_output_embeddings().register_forward_pre_hook(keep_supervised):
        logits = model(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, **kind
        ).logits
    return F.cross_entropy(logits[0].float(), targets, reduction="sum")
