"""Matrix products in float8 by torchao, an optional package: imported only where it was chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from neftune_dist.config import UserError, require


def use_float8(model: Any, recipe: str, within: Sequence[nn.Module]) -> None:
    """Convert the linear layers inside the modules `within` to float8 matrix products.

    Args:
        recipe: tensorwise scales by tensor, and gathers in float8 where several ranks shard the
            model; else torchao's name of a recipe that scales by row.
        within: blocks of the model. On a CPU the rounding to float8 is emulated.

    Raises:
        UserError: the package is missing, or the GPU has no such products.
    """
    require("torchao", f"model.float8={recipe}", "neftune-dist[float8]")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    if recipe == "tensorwise":
        sharded = dist.is_initialized() and dist.get_world_size() > 1
        config = Float8LinearConfig(enable_fsdp_float8_all_gather=sharded)
    else:
        config = Float8LinearConfig.from_recipe_name(recipe)
    if not torch.cuda.is_available():
        config = replace(config, emulate=True)
    elif torch.cuda.get_device_capability() < (8, 9):
        raise UserError(
            f"model.float8={recipe} needs a GPU with float8 matrix products (Hopper or later)."
        )
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
    """Compute the scales of all float8 weights in one reduction, after the weights have changed."""
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    precompute_float8_dynamic_scale_for_fsdp(model)
