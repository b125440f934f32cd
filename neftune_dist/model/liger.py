"""Liger's kernels (arXiv 2410.10989), an optional package: imported only where it was chosen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neftune_dist.config import UserError, require

# (hidden states (n, d), projection (vocabulary, d), its bias, targets (n,)) -> sum of losses.
LossSum = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def use_liger_kernels(model: Any) -> None:
    """Replace the model's norms, rotary embedding and SwiGLU by Liger's fused ones. Raises
    `UserError` where it has none for the model, or cannot run."""
    if not torch.cuda.is_available():
        raise UserError("model.kernels=liger needs a GPU.")
    require("liger_kernel", "model.kernels=liger", "neftune-dist[kernels]")
    from liger_kernel.transformers import monkey_patch

    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model.config.model_type not in known:
        raise UserError(
            f"model.kernels=liger has none for models of type {model.config.model_type}; it has "
            f"for {', '.join(sorted(known))}."
        )
    before = {id(m): m.forward for m in model.modules()}
    apply = known[model.config.model_type]
    # The loss stays this package's own; not every family has both switches.
    switches = inspect.signature(apply).parameters.keys()
    off = {"cross_entropy", "fused_linear_cross_entropy"} & switches
    apply(model=model, **dict.fromkeys(off, False))
    if all(before[id(m)] == m.forward for m in model.modules()):
        raise UserError(f"model.kernels=liger changed nothing in {type(model).__name__}.")


def liger_cross_entropy() -> LossSum:
    """Liger's fused projection and loss, a function as `model.loss.chunked_cross_entropy`. Raises
    `UserError` where it cannot run."""
    if not torch.cuda.is_available():
        raise UserError("model.loss=liger needs a GPU.")
    require("liger_kernel", "model.loss=liger", "neftune-dist[kernels]")
    # Optional, and slow to import.
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        found: tuple[Tensor, ...] = LigerFusedLinearCrossEntropyFunction.apply(
            *(hidden, weight, targets, bias),
            *(None, -100, 0.0, 0.0, "sum", None, False),  # no class weights, smoothing, capping
            torch.float32,  # in which it sums over chunks
        )
        return found[0].float()

    return loss_sum
