"""Exact NEFTune fine-tuning over FSDP2 and DeepSpeed ZeRO; `NEFTune` alone for any other loop."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["NEFTune", "NEFTuneCallback", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, because importing the package must not import torch: a login node validates
    # configurations without it.
    if name == "NEFTune":
        from neftune_dist.noise.neftune import NEFTune

        return NEFTune
    if name == "NEFTuneCallback":
        from neftune_dist.noise.callback import NEFTuneCallback

        return NEFTuneCallback
    raise AttributeError(f"module 'neftune_dist' has no attribute '{name}'")
