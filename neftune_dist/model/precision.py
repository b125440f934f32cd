"""The precision of the computation where `model.dtype=auto` leaves it to the device."""

from __future__ import annotations

from dataclasses import replace

import torch

from neftune_dist.config import Config
from neftune_dist.system.processor import instruction_sets

# Instructions that multiply bf16 numbers, as Linux names them on x86 and Arm processors. Without
# them bf16 is computed through float32, and gains nothing.
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}


def fast_dtype(device: torch.device) -> str:
    """The `model.dtype` that a device computes fastest: bf16 where its hardware multiplies it."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = not _BF16.isdisjoint(instruction_sets())
    return "bf16" if has_bf16 else "fp32"


def with_dtype(config: Config, dtype: str) -> Config:
    """The configuration with `model.dtype=auto` replaced by `dtype`."""
    if config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype=dtype))
