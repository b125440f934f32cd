"""The precision of the computation where `model.dtype=auto` leaves it to the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from neftune_dist.config import Config

# Instructions that multiply bf16 numbers, as Linux names them on x86 and Arm processors. Without
# them bf16 is computed through float32, and is slower than float32 itself.
_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_CPU_INFO = Path("/proc/cpuinfo")


def fast_dtype(device: torch.device) -> str:
    """The `model.dtype` that a device computes fastest: bf16 where its hardware multiplies it."""
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has_bf16 = not _CPU_FLAGS.isdisjoint(_cpu_flags())
    return "bf16" if has_bf16 else "fp32"


def with_dtype(config: Config, dtype: str) -> Config:
    """The configuration with `model.dtype=auto` replaced by `dtype`."""
    if config.model.dtype != "auto":
        return config
    return replace(config, model=replace(config.model, dtype=dtype))


def _cpu_flags() -> set[str]:
    """Names of the instruction sets of this processor; none where the system does not list them."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return set()
    listed = (line.partition(":") for line in lines)
    return {
        flag
        for name, _, flags in listed
        if name.strip() in ("flags", "Features")
        for flag in flags.split()
    }
