"""Optional packages: Liger's kernels and torchao's float8.

Each is imported where it was chosen, and nowhere else: neither is needed, and both load slowly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neftune_dist.config import UserError

# Of supervised hidden states (n, d), the projection (vocabulary, d), its bias, and targets (n,).
LossSum = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


def use_liger_kernels(model: Any) -> None:
    """Fused norms, rotary embedding and SwiGLU of Liger (arXiv 2410.10989), in the model's place.
    Raises `UserError` where it has none for the model, or cannot run."""
    if not torch.cuda.is_available():
        raise UserError("model.kernels=liger needs a GPU.")
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise UserError(
            "model.kernels=liger needs the package liger-kernel: install it."
        ) from error
    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model.config.model_type not in known:
        raise UserError(
            f"model.kernels=liger has none for models of type {model.config.model_type}; it has "
            f"for {', '.join(sorted(known))}."
        )
    before = {id(m): m.forward for m in model.modules()}
    monkey_patch._apply_liger_kernel_to_instance(
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )
    if all(before[id(m)] == m.forward for m in model.modules()):
        raise UserError(f"model.kernels=liger changed nothing in {type(model).__name__}.")


def use_float8(model: Any, recipe: str, within: Sequence[nn.Module]) -> None:
    """Matrix products of the modules `within` in float8, scaled by tensor (and gathered in float8
    where several ranks shard the model) or by row; the backward's as well. On a CPU its rounding is
    emulated. Raises `UserError` where the package is missing or the GPU has no such products."""
    logging.getLogger("torchao").setLevel(logging.ERROR)  # of kernels that it has for others
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"model.float8={recipe} needs the package torchao: install it.") from error
    settings: dict[str, Any] = {}
    if torch.cuda.is_available():
        if torch.cuda.get_device_capability() < (8, 9):
            raise UserError(
                f"model.float8={recipe} needs a GPU with float8 matrix products (Hopper or later)."
            )
    else:
        settings["emulate"] = True
    sharded = dist.is_initialized() and dist.get_world_size() > 1
    config = (
        Float8LinearConfig(enable_fsdp_float8_all_gather=sharded, **settings)
        if recipe == "tensorwise"
        else Float8LinearConfig.from_recipe_name(recipe)
    )
    if recipe != "tensorwise" and settings:
        object.__setattr__(config, "emulate", True)
    inside = {id(m) for module in within for m in module.modules()}

    def convertible(module: nn.Module, _name: str) -> bool:
        # The hardware multiplies in tiles of 16; the projection to the vocabulary stays in bf16.
        return (
            isinstance(module, nn.Linear)
            and id(module) in inside
            and module.in_features % 16 == 0
            and module.out_features % 16 == 0
        )

    convert_to_float8_training(model, config=config, module_filter_fn=convertible)


def update_float8_scales(model: Any) -> None:
    """Scales of all float8 weights in one reduction; due when weights have changed."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)


def liger_cross_entropy() -> LossSum:
    """Liger's fused projection and loss, like `model.loss.chunked_cross_entropy`. Raises
    `UserError` where it cannot run."""
    if not torch.cuda.is_available():
        raise UserError("model.loss=liger needs a GPU.")
    # Optional, and slow to import.
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError as error:
        raise UserError("model.loss=liger needs the package liger-kernel: install it.") from error

    def loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        found: tuple[Tensor, ...] = LigerFusedLinearCrossEntropyFunction.apply(
            *(hidden, weight, targets, bias),
            *(None, -100, 0.0, 0.0, "sum", None, False),  # no class weights, smoothing, capping
            torch.float32,  # in which it sums over chunks
        )
        return found[0].float()

    return loss_sum
