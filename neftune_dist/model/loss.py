"""The loss: a sum over supervised tokens; only their logits are computed, a chunk at a time.

The vocabulary projection becomes the loss: within one forward the output embedding returns the sum
of cross-entropies where the model expects logits. So the engine's hooks on that module gather its
weight, sharded or tied, as for any other.

The factor of the loss (the world size, over the step's supervised tokens) must not reach the
gradient of bf16 logits: that is -1 at nearly every target, and a factor rounded to bf16 would make
all of them too large or too small alike, by up to 0.4 %. It is multiplied into the gradients after
the projection, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neftune_dist.compat.torch import storage_id
from neftune_dist.config import UserError
from neftune_dist.model.attention import packed_arguments
from neftune_dist.model.families import changed_logits
from neftune_dist.model.liger import LossSum, liger_cross_entropy
from neftune_dist.model.modules import forward_of
from neftune_dist.model.projection import keeps_projection
from neftune_dist.system.memory_tag import memory_tag

# Float32 logits in memory at a time. Large enough that the matrix products run at full rate, small
# against a block's activations.
CHUNK_BYTES = 2**28
_SCALED_ELEMENTS = 2**24  # of a gradient, multiplied at a time


def resolve_loss(kind: str, model: Any) -> str:
    """The kind of loss for this model: auto is chunked where the loss can stand in for the logits.

    Raises:
        UserError: the model changes its logits after their projection, or the machine or a missing
            package does not allow the kind.
    """
    reason = _why_plain(model)
    if kind == "auto":
        return "plain" if reason else "chunked"
    if kind != "plain" and reason:
        raise UserError(f"{type(model).__name__} {reason}: set model.loss=plain (or auto).")
    if kind == "liger":
        liger_cross_entropy()
    return kind


def _why_plain(model: Any) -> str | None:
    """The reason why the model's logits are needed, or None."""
    setting = changed_logits(model.config)
    if setting:
        return f"changes its logits after their projection ({setting})"
    if type(model.get_output_embeddings()) is not nn.Linear:
        return "has no plain matrix as its output embedding"
    if keeps_projection(model) is False:
        return "changes its logits after their projection"
    return None


def token_losses(model: Any, batch: Any, kind: str, reduction: str = "sum") -> Tensor:
    """The cross-entropies of a micro-batch's targets.

    Args:
        model: the causal LM as its engine wraps it. It is called like the plain one.
        batch: a `MicroBatch` of `data.loader`, which this package does not import.
        kind: plain (all logits at once), chunked or liger, see `resolve_loss`.
        reduction: sum or none.

    Returns:
        float32: their sum (), 0 without targets; or by target (num_supervised,), without gradient.

    Raises:
        UserError: the model changes its logits after their projection, so that the loss cannot
            stand in for them.
    """
    head = model.get_output_embeddings()
    if batch.attention_mask is None:
        longest = max(batch.document_lengths)
        arguments = packed_arguments(head_owner(model), batch.cu_seqlens, longest)
        arguments["position_ids"] = batch.position_ids
    else:
        # Padded on the right, so that positions are the model's own: RoBERTa's do not begin at 0.
        arguments = {"attention_mask": batch.attention_mask}

    def forward() -> Tensor:
        logits: Tensor = model(input_ids=batch.input_ids, use_cache=False, **arguments).logits
        return logits

    if kind == "plain":
        return _losses_of_logits(head, forward, batch, reduction)
    loss_of: LossSum = token_cross_entropies
    if reduction == "sum":
        loss_of = liger_cross_entropy() if kind == "liger" else chunked_cross_entropy
    loss = _loss_in_place_of_logits(head, forward, batch, loss_of)
    if loss is None or loss.numel() != (1 if reduction == "sum" else len(batch.targets)):
        raise UserError(
            f"{type(head_owner(model)).__name__} changes its logits after their projection: set "
            "model.loss=plain."
        )
    return loss.view(()) if reduction == "sum" else loss.view(-1)


def _losses_of_logits(
    head: nn.Module, forward: Callable[[], Tensor], batch: Any, reduction: str
) -> Tensor:
    """The losses from the logits of all supervised tokens at once.

    The projection's gradients are multiplied by the factor that `_KeepScale` stores in `scale`.
    Where the head is no plain matrix, the gradient of the logits has that factor.
    """
    scale: list[Tensor] = []
    is_plain = type(head) is nn.Linear

    # `logits_to_keep` would do for one row; rows of a padded batch keep different positions.
    def keep_supervised(_: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0].flatten(0, 1)[batch.positions][None],)

    def project(hidden: Tensor) -> Tensor:
        given = (hidden, head.weight, head.bias)
        return F.linear(*(x if x is None else _Scale.apply(x, scale) for x in given))

    scaled = forward_of(head, project) if is_plain else nullcontext()
    with head.register_forward_pre_hook(keep_supervised), scaled:
        logits = forward()
    loss = F.cross_entropy(logits[0].float(), batch.targets, reduction=reduction)
    return _KeepScale.apply(loss, scale) if is_plain and reduction == "sum" else loss


def _loss_in_place_of_logits(
    head: nn.Linear, forward: Callable[[], Tensor], batch: Any, loss_of: LossSum
) -> Tensor | None:
    """The loss that the head computes, as the model returns it; None where the model changed it.
    (Engines return views of it; scaled or capped, it would have other memory.)"""
    given: list[Tensor] = []

    def project(hidden: Tensor) -> Tensor:
        """The loss, (1, 1, 1) or (1, num_supervised, 1)."""
        supervised = hidden.flatten(0, 1)[batch.positions]
        # No view: FSDP2 warns of those, which an operation in place would take from its hooks.
        return loss_of(supervised, head.weight, head.bias, batch.targets).view(1, -1, 1).clone()

    def keep_result(_: Any, __: Any, output: Tensor) -> None:
        given.append(output)

    with forward_of(head, project), head.register_forward_hook(keep_result):
        loss = forward()
    return loss if given and storage_id(loss) == storage_id(given[0]) else None


def head_owner(model: Any) -> Any:
    """The transformers model within an engine's wrapper."""
    return getattr(model, "module", model)


class _KeepScale(torch.autograd.Function):
    """The identity; its backward stores the gradient for `_Scale` and passes on 1."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale = scale
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.scale[:] = [grad]
        return torch.ones_like(grad), None


class _Scale(torch.autograd.Function):
    """The identity; its backward multiplies by the factor that `_KeepScale` has stored."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: list[Tensor]) -> Tensor:
        ctx.scale = scale
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return multiply_(grad, ctx.scale[0]), None


def multiply_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place, in float32. (torch would first round the factor, a tensor of a GPU, to the
    gradient's dtype: an error that all elements have in common.)"""
    if gradient.dtype == torch.float32:
        return gradient.mul_(factor)
    row = math.prod(gradient.shape[1:])
    for rows in gradient.split(max(1, _SCALED_ELEMENTS // max(1, row))):
        rows.copy_(rows.float().mul_(factor))
    return gradient


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="sum")` with no more
    than `CHUNK_BYTES` of logits at a time.

    Args:
        hidden: (n, d).
        weight: (vocabulary, d).
        bias: (vocabulary,).
        targets: int64 (n,).

    Returns:
        float32 scalar. Its gradients are computed together with it, so that no logit is computed
        twice, and summed over chunks in float32.
    """
    wanted = torch.is_grad_enabled()
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, wanted)
    return loss


@torch.no_grad()
def token_cross_entropies(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias).float(), targets, reduction="none")` with no more
    than `CHUNK_BYTES` of logits at a time.

    Returns:
        float32 (n,), without gradients.
    """
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [F.cross_entropy(F.linear(h, weight, bias).float(), t, reduction="none") for h, t in chunks]
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    @memory_tag("logits")
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        differentiate: bool,
    ) -> Tensor:
        rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        wanted = [differentiate and needed for needed in ctx.needs_input_grad[:3]]
        grads: list[Tensor | None] = [
            torch.zeros_like(hidden, dtype=torch.float32) if wanted[0] else None,
            None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None,
        ]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for h, t, at in zip(
            hidden.split(rows), targets.split(rows), range(0, len(hidden), rows), strict=False
        ):
            # One name, one memory: logits, their exponentials, d loss / d logits.
            slope = F.linear(h, weight, bias).float()
            chosen, highest = slope.gather(1, t[:, None]), slope.amax(1, keepdim=True)
            total = slope.sub_(highest).exp_().sum(1, keepdim=True)
            loss += (total.log() + highest - chosen).sum()
            if not any(wanted):
                continue
            # softmax - one_hot
            slope.div_(total).scatter_add_(1, t[:, None], slope.new_full((len(t), 1), -1.0))
            if grads[2] is not None:
                grads[2] += slope.sum(0)
            slope = slope.to(weight.dtype)
            if grads[0] is not None:
                grads[0][at : at + rows] = slope @ weight
            if wanted[1]:
                part = slope.T @ h
                # One chunk needs no sum, and so no float32 copy of a large matrix.
                grads[1] = part if grads[1] is None else grads[1].float().add_(part)
            del slope  # before the next chunk's logits come
        if wanted[1] and grads[1] is None:  # nothing was supervised
            grads[1] = torch.zeros_like(weight)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return loss

    @staticmethod
    @memory_tag("logits")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = [
            None if gradient is None else multiply_(gradient, grad).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None)
